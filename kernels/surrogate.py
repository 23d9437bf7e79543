"""The spike and its surrogate gradient.

Forward: Heaviside step. Backward: the derivative of the ATan surrogate (Fang et al. 2021),

    ds/dx = (alpha / 2) / (1 + (pi/2 * alpha * x)^2)
"""

import math
from typing import Any

import torch
from torch import Tensor


def atan_derivative(x: Tensor, alpha: float) -> Tensor:
    """ds/dx of the ATan surrogate at `x`, elementwise, in `x`'s dtype."""
    return (alpha / 2) / (1 + (math.pi / 2 * alpha * x).square())


def step(x: Tensor, strict: bool = False) -> Tensor:
    """1 where x >= 0 (x > 0 if `strict`), 0 elsewhere, NaN where x is NaN; in `x`'s dtype."""
    fired = x > 0 if strict else x >= 0
    # A NaN must stay visible: as a spike of 0 it would hide a diverged run.
    return torch.where(x.isnan(), x, fired.to(x.dtype))


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, strict: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return step(x, strict)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad * atan_derivative(x, ctx.alpha), None, None


def heaviside(x: Tensor, alpha: float = 2.0, strict: bool = False) -> Tensor:
    """`step(x, strict)` with the ATan surrogate as its gradient; any shape, same dtype out."""
    return _Heaviside.apply(x, alpha, strict)
