"""LayerNorm on GPUs: the kernels of flash-linear-attention (fla), launched and registered as torch operators.

`spikescale::layer_norm_triton` and `spikescale::layer_norm_triton_backward` have fake implementations and an
autograd formula, so `torch.compile` and activation checkpointing treat them like any torch operator.

Of fla only the device code is used. Its own functions time several launches and take the fastest, so that the
order of the sums, and with it the last bits of a result, would depend on a stopwatch; here a shape is always
launched in the same way, and a run repeats bit for bit.
"""

from typing import Any

import torch
import triton
from fla.modules.norm import layernorm as fla
from torch import Tensor
from triton.runtime.autotuner import Autotuner, Heuristics

from spikescale.kernels import gpu

# A program goes through its rows one after another, waiting for each: several share a multiprocessor.
PROGRAMS = 4
MOST_WARPS = 16


def _kernel(tuned: Any) -> Any:
    """The kernel inside what chooses its launch."""
    while isinstance(tuned, Autotuner | Heuristics):
        tuned = tuned.fn
    return tuned


FORWARD = _kernel(fla.layer_norm_fwd_kernel_row)
BACKWARD = _kernel(fla.layer_norm_bwd_kernel_row)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `layer_norm`, for float32, bfloat16 and float16 on a GPU; computed in float32."""
    return layer_norm_forward(x, weight, bias, eps)[0]


def _launch(channels: int, elements: int) -> dict[str, Any]:
    """Constants and options of a launch in which a thread holds so many elements of a row."""
    lanes = triton.next_power_of_2(channels)
    options = {"G": 1, "D": channels, "BD": lanes, "IS_RMS_NORM": False, "HAS_WEIGHT": True, "HAS_BIAS": True}
    warps = min(gpu.warps(lanes // elements), MOST_WARPS)
    return {**options, "num_warps": warps, "enable_fp_fusion": True}


@torch.library.custom_op("spikescale::layer_norm_triton", mutates_args=())
def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, 1 / standard deviation), the latter two of shape x.shape[:-1], float32."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y, mean, rstd = _outputs(x)
    if x.numel():
        with gpu.on_device(x):
            FORWARD[(mean.numel(),)](
                x=x, y=y, w=weight, b=bias, res=None, res_out=None, mean=mean, rstd=rstd, eps=eps,
                HAS_RESIDUAL=False, STORE_RESIDUAL_OUT=False, **_launch(x.shape[-1], 8),
            )  # fmt: skip
    return y, mean, rstd


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@layer_norm_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x)


@torch.library.custom_op("spikescale::layer_norm_triton_backward", mutates_args=())
def layer_norm_backward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    x, weight, bias, grad_y = x.contiguous(), weight.contiguous(), bias.contiguous(), grad_y.contiguous()
    grad_x, rows, channels = x.new_empty(x.shape), mean.numel(), x.shape[-1]
    programs = min(PROGRAMS * gpu.multiprocessors(x.device), rows)
    # A row of sums for every program: no atomics.
    sums = x.new_empty((2, programs, channels), dtype=torch.float32)
    if x.numel():
        with gpu.on_device(x):
            BACKWARD[(programs,)](
                x=x, w=weight, b=bias, y=None, dy=grad_y, dx=grad_x, dw=sums[0], db=sums[1],
                dres=None, dres_in=None, mean=mean, rstd=rstd, T=rows, BS=triton.cdiv(rows, programs),
                GS=programs, HAS_DRESIDUAL=False, STORE_DRESIDUAL=False, RECOMPUTE_OUTPUT=False,
                **_launch(channels, 4),
            )  # fmt: skip
    grad_weight, grad_bias = sums.sum(1)
    return grad_x, grad_weight.to(weight.dtype, copy=True), grad_bias.to(weight.dtype, copy=True)


@layer_norm_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(x, weight, bias, output[1], output[2])


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 4
    return (*layer_norm_backward(*ctx.saved_tensors, grad_y), None)


layer_norm_forward.register_autograd(_backward, setup_context=_setup_context)
