"""How the engine keeps weights and vectors: README.md describes it, `cpu.cpp` and `matmul.h` rely on it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL = 32  # outputs that are computed together


def padded(count: int) -> int:
    """`count` rounded up to whole panels."""
    return -(-count // PANEL) * PANEL


def pad(x: Tensor) -> Tensor:
    """A copy of x (..., C) in float32, its last dimension filled up to whole panels with zeros."""
    out = torch.zeros(*x.shape[:-1], padded(x.shape[-1]))
    out[..., : x.shape[-1]] = x.detach()
    return out


def packed_size(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Elements that `panels` of a matrix of `shape` (outputs, inputs) has."""
    outputs, inputs = shape
    return padded(outputs) * (inputs + inputs % _inputs_together(dtype))


def _inputs_together(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


def panels(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (outputs, inputs) as panels: (panels, inputs, PANEL), each input's PANEL weights side by side.

    In bfloat16, rounded to nearest even, two inputs are interleaved: (panels, inputs / 2, PANEL, 2). Missing
    outputs, and a missing second input, are zeros.
    """
    outputs, inputs = weight.shape
    pair = _inputs_together(dtype)
    odd = inputs % pair
    weight = F.pad(weight.detach(), (0, odd, 0, padded(outputs) - outputs)).to(dtype)
    grouped = weight.view(-1, PANEL, (inputs + odd) // pair, pair)
    return grouped.transpose(1, 2).reshape(grouped.shape[0], inputs + odd, PANEL)
