"""LIF on CPU: `cpu.cpp` bound with ctypes, registered as torch operators.

`spikescale::lif_forward` and `spikescale::lif_backward` have fake implementations and an autograd
formula, so `torch.compile` and activation checkpointing treat them like any torch operator.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikescale.kernels.build import load
from spikescale.kernels.cpu import as_bytes, pointer


class _Options(ctypes.Structure):
    _fields_ = (
        ("tau", ctypes.c_float),
        ("v_threshold", ctypes.c_float),
        ("v_reset", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("soft_reset", ctypes.c_int32),
        ("detach_reset", ctypes.c_int32),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, built at the first call. Raises BuildError."""
    lib = load(Path(__file__).with_name("cpu.cpp"))
    sizes = [ctypes.c_int64] * 3
    for suffix in ("f32", "bf16"):
        for direction in ("forward", "backward"):
            function = getattr(lib, f"lif_{direction}_{suffix}")
            function.argtypes = [ctypes.c_void_p] * 6 + [*sizes, _Options, ctypes.c_int32]
            function.restype = None
    return lib


def _call(
    direction: str,
    dtype: torch.dtype,
    tensors: tuple[Tensor | None, ...],
    shape: torch.Size,
    options: _Options,
) -> None:
    function = getattr(library(), f"lif_{direction}_{'bf16' if dtype == torch.bfloat16 else 'f32'}")
    function(*(pointer(tensor) for tensor in tensors), *shape, options, torch.get_num_threads())


@torch.library.custom_op("spikescale::lif_forward", mutates_args=(), device_types="cpu")
def lif_forward(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, final v, h); h, the membrane before the reset, is what backward needs: empty unless `save`."""
    x, v, reset = x.contiguous(), v.contiguous(), as_bytes(reset)
    spikes, v_out = torch.empty_like(x), torch.empty_like(v)
    h = torch.empty(x.shape if save else (0,), dtype=torch.float32)
    options = _Options(tau, v_threshold, v_reset, surrogate_alpha, soft_reset, detach_reset)
    tensors = (x, v, reset, spikes, v_out, h if save else None)
    _call("forward", x.dtype, tensors, x.shape, options)
    return spikes, v_out, h


@lif_forward.register_fake
def _(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    v_out = torch.empty_like(v, memory_format=torch.contiguous_format)
    return spikes, v_out, x.new_empty(x.shape if save else (0,), dtype=torch.float32)


@torch.library.custom_op("spikescale::lif_backward", mutates_args=(), device_types="cpu")
def lif_backward(
    h: Tensor,
    reset: Tensor | None,
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (in grad_spikes' dtype) and of the initial v (float32)."""
    grad_spikes, reset = grad_spikes.contiguous(), as_bytes(reset)
    grad_v = None if grad_v is None else grad_v.contiguous()
    grad_x = torch.empty_like(grad_spikes)
    grad_v0 = h.new_empty(h.shape[0], h.shape[2])
    options = _Options(tau, v_threshold, v_reset, surrogate_alpha, soft_reset, detach_reset)
    tensors = (h, reset, grad_spikes, grad_v, grad_x, grad_v0)
    _call("backward", grad_spikes.dtype, tensors, h.shape, options)
    return grad_x, grad_v0


@lif_backward.register_fake
def _(
    h: Tensor,
    reset: Tensor | None,
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(grad_spikes, memory_format=torch.contiguous_format)
    return grad_x, h.new_empty(h.shape[0], h.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    reset, options = inputs[2], inputs[3:9]
    h = output[2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(h, reset)
    ctx.options, ctx.dtype = options, inputs[0].dtype


def _backward(
    ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    h, reset = ctx.saved_tensors
    nothing = (None,) * 8
    if grad_spikes is None and grad_v is None:
        return None, None, *nothing
    if grad_spikes is None:
        grad_spikes = torch.zeros_like(h, dtype=ctx.dtype)
    grad_x, grad_v0 = lif_backward(h, reset, grad_spikes, grad_v, *ctx.options)
    return grad_x, grad_v0, *nothing


lif_forward.register_autograd(_backward, setup_context=_setup_context)
