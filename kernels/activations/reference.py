"""Elementwise functions of the channel mix, the definition: computed in at least float32, rounded once."""

import torch
from torch import Tensor


def squared_relu_reference(x: Tensor) -> Tensor:
    """relu(x)^2 in x's dtype."""
    return torch.relu(_widened(x)).square().to(x.dtype)


def sigmoid_gate_reference(gate: Tensor, x: Tensor) -> Tensor:
    """sigmoid(gate) * x in x's dtype."""
    return (torch.sigmoid(_widened(gate)) * _widened(x)).to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
