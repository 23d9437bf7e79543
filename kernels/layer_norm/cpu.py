"""LayerNorm on CPU: `cpu.cpp` bound with ctypes, registered as torch operators."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikescale.kernels.cpu import load_for, pointer


@functools.cache
def library(backend: str) -> ctypes.CDLL:
    """The kernels compiled for `backend`, built at the first call. Raises BuildError."""
    lib = load_for(backend, Path(__file__).with_name("cpu.cpp"))
    sizes = [ctypes.c_int64] * 2
    lib.layer_norm_forward.argtypes = [ctypes.c_void_p] * 6 + [*sizes, ctypes.c_double, ctypes.c_int32]
    lib.layer_norm_backward.argtypes = [ctypes.c_void_p] * 8 + [*sizes, ctypes.c_int32]
    lib.layer_norm_forward.restype = lib.layer_norm_backward.restype = None
    return lib


def layer_norm_cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
    """As `layer_norm`, for float32 tensors; `backend` is one of CPU_BACKENDS."""
    return layer_norm_forward(x, weight, bias, eps, backend)[0]


@torch.library.custom_op("spikescale::layer_norm_forward", mutates_args=(), device_types="cpu")
def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, 1 / standard deviation), the latter two of shape x.shape[:-1]."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y, mean, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1]), x.new_empty(x.shape[:-1])
    tensors = (x, weight, bias, y, mean, rstd)
    rows, threads = mean.numel(), torch.get_num_threads()
    library(backend).layer_norm_forward(*map(pointer, tensors), rows, x.shape[-1], eps, threads)
    return y, mean, rstd


@layer_norm_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1]), x.new_empty(x.shape[:-1])


@torch.library.custom_op("spikescale::layer_norm_backward", mutates_args=(), device_types="cpu")
def layer_norm_backward(
    x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, grad_y: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    inputs = [tensor.contiguous() for tensor in (x, weight, mean, rstd, grad_y)]
    grads = (x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape))
    rows, threads = mean.numel(), torch.get_num_threads()
    library(backend).layer_norm_backward(*map(pointer, (*inputs, *grads)), rows, x.shape[-1], threads)
    return grads


@layer_norm_backward.register_fake
def _(
    x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, grad_y: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(x, weight, output[1], output[2])


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 5
    return (*layer_norm_backward(*ctx.saved_tensors, grad_y, ctx.backend), None, None)


layer_norm_forward.register_autograd(_backward, setup_context=_setup_context)
