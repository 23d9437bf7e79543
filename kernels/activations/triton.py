"""Elementwise functions of the channel mix on GPUs: one Triton kernel forward and one backward for each.

`spikescale::squared_relu_triton`, `spikescale::sigmoid_gate_triton` and their backward operators have fake
implementations and autograd formulas, so `torch.compile` and activation checkpointing treat them like any
torch operator. Everything is computed in float32 and rounded once.
"""

# A kernel's parameters have Triton's types.
# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikescale.kernels import gpu

BLOCK = 1024  # elements of one program: 8 a thread


@triton.jit
def squared_relu_forward_kernel(x, y, size, BLOCK: tl.constexpr):
    i, inside = _elements(size, BLOCK)
    value = tl.load(x + i, mask=inside).to(tl.float32)
    # Not tl.maximum: a NaN must stay a NaN.
    positive = tl.where(value <= 0, 0.0, value)
    tl.store(y + i, (positive * positive).to(y.dtype.element_ty), mask=inside)


@triton.jit
def squared_relu_backward_kernel(
    saved, grad_y, grad_x, size, SAVED_OUTPUT: tl.constexpr, BLOCK: tl.constexpr
):
    i, inside = _elements(size, BLOCK)
    value = tl.load(saved + i, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y + i, mask=inside).to(tl.float32)
    positive = tl.sqrt(value) if SAVED_OUTPUT else tl.where(value <= 0, 0.0, value)
    tl.store(grad_x + i, (2.0 * positive * grad).to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def sigmoid_gate_forward_kernel(gate, x, y, size, BLOCK: tl.constexpr):
    i, inside = _elements(size, BLOCK)
    logit = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + i, mask=inside).to(tl.float32)
    sigmoid, _ = _sigmoid_and_slope(logit)
    tl.store(y + i, (sigmoid * value).to(y.dtype.element_ty), mask=inside)


@triton.jit
def sigmoid_gate_backward_kernel(gate, x, grad_y, grad_gate, grad_x, size, BLOCK: tl.constexpr):
    i, inside = _elements(size, BLOCK)
    logit = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + i, mask=inside).to(tl.float32)
    grad = tl.load(grad_y + i, mask=inside).to(tl.float32)
    sigmoid, slope = _sigmoid_and_slope(logit)
    tl.store(grad_gate + i, (grad * value * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_x + i, (grad * sigmoid).to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _elements(size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i < size


@triton.jit
def _sigmoid_and_slope(logit):
    # exp of a number <= 0 cannot overflow, and 1 - sigmoid is never formed, which would cancel.
    small = tl.exp(-tl.abs(logit))
    large = 1.0 / (1.0 + small)
    return tl.where(logit >= 0, large, small * large), small * large * large


def _launch(kernel: Any, *tensors: Tensor, **options: Any) -> None:
    size = tensors[0].numel()
    if size:
        grid = (triton.cdiv(size, BLOCK),)
        with gpu.on_device(tensors[0]):
            # Fusion makes an FMA of the exponential's argument: irrelevant here, but its default changes.
            kernel[grid](
                *tensors, size, **options, BLOCK=BLOCK, num_warps=gpu.warps(BLOCK // 8), enable_fp_fusion=True
            )


def squared_relu_triton(x: Tensor) -> Tensor:
    """As `squared_relu`, for float32, bfloat16 and float16 on a GPU.

    Backward needs relu(x), which is the root of the output. The output is kept anyway by the linear layer
    that follows, so that x can be freed. For float16 x itself is kept, as there small squares vanish.
    """
    return squared_relu_forward(x)


@torch.library.custom_op("spikescale::squared_relu_triton", mutates_args=())
def squared_relu_forward(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _launch(squared_relu_forward_kernel, x, y)
    return y


@torch.library.custom_op("spikescale::squared_relu_triton_backward", mutates_args=())
def squared_relu_backward(saved: Tensor, grad_y: Tensor, saved_output: bool) -> Tensor:
    """Gradient of x. `saved` is the output if `saved_output`, else x."""
    saved, grad_y = saved.contiguous(), grad_y.contiguous()
    grad_x = torch.empty_like(saved)
    _launch(squared_relu_backward_kernel, saved, grad_y, grad_x, SAVED_OUTPUT=saved_output)
    return grad_x


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@squared_relu_forward.register_fake
def _(x: Tensor) -> Tensor:
    return _contiguous_like(x)


@squared_relu_backward.register_fake
def _(saved: Tensor, grad_y: Tensor, saved_output: bool) -> Tensor:
    return _contiguous_like(saved)


def _save_squared_relu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.saved_output = output.dtype != torch.float16
    ctx.save_for_backward(output if ctx.saved_output else inputs[0])


def _squared_relu_gradient(ctx: Any, grad_y: Tensor) -> Tensor:
    return squared_relu_backward(*ctx.saved_tensors, grad_y, ctx.saved_output)


squared_relu_forward.register_autograd(_squared_relu_gradient, setup_context=_save_squared_relu)


def sigmoid_gate_triton(gate: Tensor, x: Tensor) -> Tensor:
    """As `sigmoid_gate`, for two tensors of one dtype, float32, bfloat16 or float16, on a GPU."""
    return sigmoid_gate_forward(gate, x)


@torch.library.custom_op("spikescale::sigmoid_gate_triton", mutates_args=())
def sigmoid_gate_forward(gate: Tensor, x: Tensor) -> Tensor:
    gate, x = gate.contiguous(), x.contiguous()
    y = torch.empty_like(x)
    _launch(sigmoid_gate_forward_kernel, gate, x, y)
    return y


@torch.library.custom_op("spikescale::sigmoid_gate_triton_backward", mutates_args=())
def sigmoid_gate_backward(gate: Tensor, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and x."""
    gate, x, grad_y = gate.contiguous(), x.contiguous(), grad_y.contiguous()
    grad_gate, grad_x = torch.empty_like(gate), torch.empty_like(x)
    _launch(sigmoid_gate_backward_kernel, gate, x, grad_y, grad_gate, grad_x)
    return grad_gate, grad_x


@sigmoid_gate_forward.register_fake
def _(gate: Tensor, x: Tensor) -> Tensor:
    return _contiguous_like(x)


@sigmoid_gate_backward.register_fake
def _(gate: Tensor, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    return _contiguous_like(gate), _contiguous_like(x)


def _save_sigmoid_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sigmoid_gate_gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    return sigmoid_gate_backward(*ctx.saved_tensors, grad_y)


sigmoid_gate_forward.register_autograd(_sigmoid_gate_gradient, setup_context=_save_sigmoid_gate)
