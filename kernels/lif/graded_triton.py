"""Graded neurons on GPUs: launches of the Triton kernels, differentiated once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikescale.kernels.lif import triton_graded as kernels
from spikescale.kernels.lif.triton import divisor, launch, number_or_vector
from spikescale.kernels.masks import as_bytes

__all__ = ["graded_lif_triton"]


def graded_lif_triton(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    tau: float | Tensor,
    v_threshold: float | Tensor,
    options: tuple[int, bool, float, bool, bool, float],
) -> tuple[Tensor, Tensor]:
    """`graded_lif` for GPU tensors: x float32, bfloat16 or float16, v float32.

    Args:
        tau, v_threshold: numbers, or float32 of one value, or of one a channel.
        options: levels, signed, v_reset, soft_reset, detach_reset, surrogate_alpha.
    """
    each = [
        value.expand(x.shape[2]) if isinstance(value, Tensor) and value.dim() == 0 else value
        for value in (tau, v_threshold)
    ]
    (tau_vector, tau_number), (threshold_vector, threshold_number) = map(number_or_vector, each)
    spikes, v_out = _Graded.apply(
        x, v, reset, tau_vector, threshold_vector, tau_number, threshold_number, options
    )
    return spikes, v_out


class _Graded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        reset: Tensor | None,
        tau: Tensor | None,
        threshold: Tensor | None,
        tau_number: float,
        threshold_number: float,
        options: tuple[int, bool, float, bool, bool, float],
    ) -> tuple[Tensor, Tensor]:
        batch, length, channels = x.shape
        v, reset = v.contiguous(), as_bytes(reset)
        tau, threshold = (None if value is None else value.contiguous() for value in (tau, threshold))
        spikes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        v_out = torch.empty_like(v)
        blocks = -(-length // kernels.TOKENS.value)
        starts = v.new_empty(batch, blocks, channels) if any(ctx.needs_input_grad) else None
        ctx.tau, inverse = divisor(tau, tau_number)
        levels, signed, v_reset, soft_reset, ctx.detach_reset, ctx.alpha = options
        ctx.threshold = threshold_number
        ctx.constants = {
            "V_RESET": v_reset,
            "LEVELS": levels,
            "SIGNED": signed,
            "SOFT_RESET": soft_reset,
            "INVERSE_TAU": inverse,
            "WHOLE": length % kernels.TOKENS.value == 0,
        }
        launch(
            kernels.graded_forward_kernel, x, 1,
            x, v, reset, tau, threshold, spikes, v_out, starts, length, channels, *x.stride(), ctx.tau,
            threshold_number, **ctx.constants,
        )  # fmt: skip
        ctx.save_for_backward(x, reset, tau, threshold, starts)
        return spikes, v_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor, grad_v_out: Tensor) -> tuple[Tensor | None, ...]:
        x, reset, tau, threshold, starts = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_v = torch.empty_like(grad_v_out, memory_format=torch.contiguous_format)
        grad_tau, grad_threshold = (
            torch.empty_like(grad_v) if wanted else None for wanted in ctx.needs_input_grad[3:5]
        )
        launch(
            kernels.graded_backward_kernel, x, 1,
            x, reset, tau, threshold, starts, grad_spikes, grad_v_out.contiguous(), grad_x, grad_v, grad_tau,
            grad_threshold, *x.shape[1:], *x.stride(), *grad_spikes.stride(), ctx.tau, ctx.threshold,
            ctx.alpha, **ctx.constants, DETACH_RESET=ctx.detach_reset,
        )  # fmt: skip
        summed = (None if rows is None else rows.sum(0) for rows in (grad_tau, grad_threshold))
        return grad_x, grad_v, None, *summed, None, None, None
