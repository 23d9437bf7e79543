"""The loss of each source of a mixture, in the steps that are logged."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spikescale.evaluation.language_model import TokenLosses
from spikescale.training.samples import IGNORED


class SourceLosses:
    """Sums the losses of a step's rows by their source.

    Args:
        names: of the sources, by number.
        token_losses: of logits and targets, see `TokenLosses`.
        device: of the model.
    """

    def __init__(self, names: Sequence[str], token_losses: TokenLosses, device: torch.device) -> None:
        self._names, self._token_losses = list(names), token_losses
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor, sources: np.ndarray) -> None:
        """Count rows: logits (B, T, V), left as they are, targets (B, T), the rows' sources (B,)."""
        for row, target, source in zip(logits, targets, sources.tolist(), strict=True):
            kept = target != IGNORED
            losses = self._token_losses(row[kept], target[kept])
            self._sums[0, source] += losses.sum(dtype=torch.float64)
            self._sums[1, source] += losses.numel()

    def read(self) -> dict[str, float]:
        """Nats a token of each source that had rows in the step, over all ranks; every rank calls it."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Ranks of one tensor group count the same rows: in the quotient that drops out.
            torch.distributed.all_reduce(self._sums)
        sums, counts = self._sums.tolist()
        self._sums.zero_()
        return {
            name: total / count for name, total, count in zip(self._names, sums, counts, strict=True) if count
        }
