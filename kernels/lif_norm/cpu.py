"""Neurons, residual sum, dropout and LayerNorm on CPU: `cpu.cpp` bound with ctypes, as torch operators."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikescale.kernels.cpu import load_for, pointer
from spikescale.kernels.lif.cpu import (
    LifOptions,
    as_number,
    as_tensor,
    contiguous,
    needs_grad,
    new_marks,
)
from spikescale.kernels.masks import as_bytes


class _Options(ctypes.Structure):
    """`LifNormOptions` of cpu.cpp."""

    _fields_ = (
        ("lif", LifOptions),
        ("scale", ctypes.c_float),
        ("threshold", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("eps", ctypes.c_double),
    )


@functools.cache
def library(backend: str) -> ctypes.CDLL:
    """The kernels compiled for `backend`, built at the first call. Raises BuildError."""
    lib = load_for(backend, Path(__file__).with_name("cpu.cpp"))
    for suffix in ("f32", "bf16"):
        for direction, tensors in (("forward", 14), ("backward", 19)):
            function = getattr(lib, f"lif_norm_{direction}_{suffix}")
            sizes = [ctypes.c_int64] * 3
            function.argtypes = [ctypes.c_void_p] * tensors + [*sizes, _Options, ctypes.c_int32]
            function.restype = None
    return lib


def lif_residual_norm_cpu(
    x: Tensor,
    current: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tau: float | Tensor,
    v_threshold: float | Tensor,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    dropout: float,
    seed: int,
    reset: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `lif_residual_norm`; x float32, current float32 or bfloat16, `backend` one of CPU_BACKENDS."""
    taus, thresholds = as_tensor(tau), as_tensor(v_threshold)
    tensors = (x, current, v, weight, bias, reset, taus, thresholds)
    neuron = (as_number(tau), as_number(v_threshold), v_reset, soft_reset, detach_reset, surrogate_alpha)
    save = needs_grad(x, current, v, weight, bias, taus, thresholds)
    x_out, normed, v_out, *_ = lif_norm_forward(*tensors, *neuron, eps, dropout, seed, save, backend)
    return x_out, None if weight is None else normed, v_out


@torch.library.custom_op("spikescale::lif_norm_forward", mutates_args=(), device_types="cpu")
def lif_norm_forward(
    x: Tensor,
    current: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    reset: Tensor | None,
    taus: Tensor | None,
    thresholds: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    eps: float,
    dropout: float,
    seed: int,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x', normed, final v, marks, mean, 1 / standard deviation).

    Marks are empty unless `save`; normed, mean and deviation are empty without `weight`.
    """
    inputs = (
        *contiguous(x, current, v, weight, bias),
        as_bytes(reset),
        *contiguous(taus, thresholds),
    )
    options = _options(
        tau, v_threshold, v_reset, soft_reset, detach_reset, surrogate_alpha, eps, dropout, seed
    )
    x_out, normed, v_out, marks, mean, rstd = outputs = _new_outputs(x, weight, save)
    written = (x_out, normed, v_out, marks if save else None, mean, rstd)
    _call("forward", backend, (*inputs, *written), current, options)
    return outputs


@lif_norm_forward.register_fake
def _(
    x: Tensor, current: Tensor, v: Tensor, weight: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_outputs(x, weight, arguments[-2])


def _new_outputs(
    x: Tensor, weight: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    normed_shape, row_shape = ((0,), (0,)) if weight is None else (x.shape, (batch, length))
    return (
        x.new_empty(x.shape),
        x.new_empty(normed_shape),
        x.new_empty(batch, channels),
        new_marks(x, save),
        x.new_empty(row_shape),
        x.new_empty(row_shape),
    )


@torch.library.custom_op("spikescale::lif_norm_backward", mutates_args=(), device_types="cpu")
def lif_norm_backward(
    current: Tensor,
    x_out: Tensor,
    weight: Tensor | None,
    reset: Tensor | None,
    taus: Tensor | None,
    thresholds: Tensor | None,
    marks: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_out: Tensor | None,
    grad_normed: Tensor | None,
    grad_v: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    eps: float,
    dropout: float,
    seed: int,
    parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, current, the initial v, weight, bias, taus and thresholds.

    Those of weight and bias are empty without `grad_normed`, the last two unless `parameters`.
    """
    inputs = (
        *contiguous(current, x_out, weight),
        as_bytes(reset),
        *contiguous(taus, thresholds, marks, mean, rstd, grad_out, grad_normed, grad_v),
    )
    options = _options(
        tau, v_threshold, v_reset, soft_reset, detach_reset, surrogate_alpha, eps, dropout, seed
    )
    grads = _new_gradients(current, grad_normed, parameters)
    written = (
        *grads[:3],
        *(grads[3:5] if grad_normed is not None else (None, None)),
        *(grads[5:] if parameters else (None, None)),
    )
    _call("backward", backend, (*inputs, *written), current, options)
    return grads


@lif_norm_backward.register_fake
def _(current: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_gradients(current, arguments[9], arguments[-2])


def _new_gradients(
    current: Tensor, grad_normed: Tensor | None, parameters: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, channels = current.shape

    def new(*shape: int) -> Tensor:
        return current.new_empty(shape, dtype=torch.float32)

    norm, neuron = channels if grad_normed is not None else 0, channels if parameters else 0
    return (
        new(*current.shape),
        current.new_empty(current.shape),
        new(batch, channels),
        new(norm),
        new(norm),
        new(neuron),
        new(neuron),
    )


def _options(
    tau: float,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    eps: float,
    dropout: float,
    seed: int,
) -> _Options:
    lif = LifOptions(tau, v_threshold, v_reset, surrogate_alpha, soft_reset, detach_reset)
    return _Options(lif, 1 / (1 - dropout), int(dropout * 2**32), seed, eps)


def _call(
    direction: str, backend: str, tensors: tuple[Tensor | None, ...], current: Tensor, options: _Options
) -> None:
    suffix = "bf16" if current.dtype == torch.bfloat16 else "f32"
    function = getattr(library(backend), f"lif_norm_{direction}_{suffix}")
    function(*(pointer(tensor) for tensor in tensors), *current.shape, options, torch.get_num_threads())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, current, _, weight, _, reset, taus, thresholds, *options, _, backend = inputs
    x_out, _, _, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(current, x_out, weight, reset, taus, thresholds, *saved)
    ctx.options, ctx.backend = options, backend


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_normed: Tensor | None, grad_v: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if saved[2] is None:
        grad_normed = None
    nothing = (None,) * 11
    if grad_out is None and grad_normed is None and grad_v is None:
        return (None,) * 8 + nothing
    parameters = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
    grads = lif_norm_backward(*saved, grad_out, grad_normed, grad_v, *ctx.options, parameters, ctx.backend)
    grad_x, grad_current, grad_v0, *sums = grads
    # An empty gradient stands for none.
    weight, bias, tau, threshold = (grad if grad.numel() else None for grad in sums)
    if not ctx.needs_input_grad[6]:
        tau = None
    if not ctx.needs_input_grad[7]:
        threshold = None
    return (grad_x, grad_current, grad_v0, weight, bias, None, tau, threshold, *nothing)


lif_norm_forward.register_autograd(_backward, setup_context=_setup_context)
