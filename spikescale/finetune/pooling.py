"""From the vectors of a text's tokens to its class: mean and a small network (SpikeGPT Eqs. 14-15)."""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mean_over_text(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (B, C) of vectors (B, T, C) over the tokens where `mask` (B, T) is not 0; None: over all.

    Raises ValueError for a row without any.
    """
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype)[..., None]
    lengths = weights.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError("attention_mask: a text without tokens cannot be classified")
    # Not a product alone: what stands at padding may be anything.
    return torch.where(weights > 0, hidden, 0.0).sum(1) / lengths


class ClassificationHead(nn.Module):
    """Two linear layers with a tanh between: (B, width) -> logits (B, labels).

    `dropout` is applied before each of them, in training. The parameters have no values until `initialise`.
    """

    def __init__(self, width: int, inner: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)
        self.out = nn.Linear(inner, labels)
        self.dropout = dropout

    def initial_values(self) -> Iterator[tuple[Tensor, Callable[[], Tensor]]]:
        """Every parameter and what makes its initial value: normal of deviation 1/sqrt(inputs), biases 0."""
        for layer in (self.dense, self.out):
            yield layer.weight, functools.partial(_normal, layer.weight.shape)
            yield layer.bias, functools.partial(torch.zeros, layer.bias.shape, device="cpu")

    @torch.no_grad()
    def initialise(self) -> "ClassificationHead":
        """Draw initial values by torch's seed; returns itself."""
        for parameter, value in self.initial_values():
            parameter.copy_(value())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.dropout(x, self.dropout, self.training)
        x = torch.tanh(self.dense(x))
        logits: Tensor = self.out(F.dropout(x, self.dropout, self.training))
        return logits


def _normal(shape: torch.Size) -> Tensor:
    return torch.randn(shape, device="cpu") / math.sqrt(shape[1])
