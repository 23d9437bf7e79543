"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in this order.

Every function takes logits (B, V) and returns new ones, with minus infinity where a token is excluded.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spikescale.errors import UserError

CANDIDATES = 512  # the most probable tokens, among which top-p looks before it sorts all


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. Raises UserError for a value out of range."""

    temperature: float = 1.0  # 0: always the most probable token
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0  # 1: no limit
    repetition_penalty: float = 1.0  # 1: none; above: tokens seen before become less probable
    seed: int = 0
    max_tokens: int = 256
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        for name, allowed, good in (
            ("temperature", "0 or more", 0 <= self.temperature < math.inf),
            ("top_k", "0 or more", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("repetition_penalty", "above 0", 0 < self.repetition_penalty < math.inf),
            ("seed", "from 0 to 2**63 - 1", 0 <= self.seed < 2**63),
            ("max_tokens", "0 or more", self.max_tokens >= 0),
        ):
            if not good:
                raise UserError(f"{name} = {getattr(self, name)}: must be {allowed}")


def penalise_seen(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of the tokens `seen` (B, V, bool) by `penalty`, and multiply negative ones.

    Source: Keskar et al., CTRL (2019), Sec. 4.1, with the sign handled so that both lower the odds.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Exclude all but the `k` largest logits of each row (all are kept when k >= V)."""
    if k >= logits.shape[-1]:
        return logits
    values, indices = logits.topk(k, dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, indices, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most probable tokens whose probabilities add up to at least `p`, but always one.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (2020), Sec. 3.1.
    """
    probabilities = logits.softmax(dim=-1)
    ordered, indices = probabilities.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
    if logits.shape[-1] > CANDIDATES and bool((ordered.sum(dim=-1) < p).any()):
        ordered, indices = probabilities.sort(dim=-1, descending=True)
    # A token is needed when those before it do not reach p; nothing is before the first.
    reached_before = ordered.cumsum(dim=-1) - ordered
    needed = reached_before < p
    needed[..., 0] = True
    kept = logits.gather(-1, indices).masked_fill(~needed, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, indices, kept)


def choose(
    logits: Tensor, settings: SamplingSettings, generator: torch.Generator, seen: Tensor | None = None
) -> Tensor:
    """One token (B,), int64, of each row of `logits` (B, V). `seen` (B, V, bool): tokens to penalise.

    Raises UserError when there is nothing to draw from: a NaN or an infinity among the logits.
    """
    logits = logits.float()
    if seen is not None and settings.repetition_penalty != 1:
        logits = penalise_seen(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    if settings.top_k:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = keep_top_p(logits, settings.top_p)
    # One number a row and a search, where torch.multinomial draws one for each of V tokens. In float64, in
    # which the total times a float32 below 1 stays below the total.
    reached = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = reached[:, -1:]
    if not bool(total.isfinite().all()):
        raise UserError(
            "the model's logits are not finite numbers: it has diverged, or its weights are damaged"
        )
    point = total * torch.rand(total.shape, generator=generator, device=total.device)
    return torch.searchsorted(reached, point, right=True).squeeze(-1)
