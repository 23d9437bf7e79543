"""LIF on CPU: `cpu.cpp` bound with ctypes, registered as torch operators.

`spikescale::lif_forward` and `spikescale::lif_backward` have fake implementations and an autograd
formula, so `torch.compile` and activation checkpointing treat them like any torch operator. A time
constant or threshold is passed twice, as a number and as an optional tensor that overrides it.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikescale.kernels.cpu import load_for, pointer
from spikescale.kernels.masks import as_bytes

MARK = 16  # tokens from one saved membrane to the next, as in include/lif.h


class LifOptions(ctypes.Structure):
    """The C struct of this name."""

    _fields_ = (
        ("tau", ctypes.c_float),
        ("v_threshold", ctypes.c_float),
        ("v_reset", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("soft_reset", ctypes.c_int32),
        ("detach_reset", ctypes.c_int32),
    )


@functools.cache
def library(backend: str) -> ctypes.CDLL:
    """The kernels compiled for `backend`, built at the first call. Raises BuildError."""
    lib = load_for(backend, Path(__file__).with_name("cpu.cpp"))
    for suffix in ("f32", "bf16"):
        for direction, tensors in (("forward", 8), ("backward", 11)):
            function = getattr(lib, f"lif_{direction}_{suffix}")
            sizes = [ctypes.c_int64] * 3
            function.argtypes = [ctypes.c_void_p] * tensors + [*sizes, LifOptions, ctypes.c_int32]
            function.restype = None
    lib.lif_mark.restype = lib.lif_backward_segments.restype = ctypes.c_int64
    lib.lif_backward_segments.argtypes = [*[ctypes.c_int64] * 3, ctypes.c_int32]
    assert lib.lif_mark() == MARK
    return lib


def lif_cpu(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    tau: float | Tensor,
    v_threshold: float | Tensor,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(spikes, final v) as `lif` describes them; x float32 or bfloat16, `backend` one of CPU_BACKENDS."""
    taus, thresholds = as_tensor(tau), as_tensor(v_threshold)
    save = needs_grad(x, v, taus, thresholds)
    options = (as_number(tau), as_number(v_threshold), v_reset, soft_reset, detach_reset, surrogate_alpha)
    spikes, v_out, _ = lif_forward(x, v, reset, taus, thresholds, *options, save, backend)
    return spikes, v_out


def as_tensor(parameter: float | Tensor) -> Tensor | None:
    """A parameter that has a value for every channel."""
    return parameter if isinstance(parameter, Tensor) else None


def as_number(parameter: float | Tensor) -> float:
    """A parameter that is the same for all channels; of no meaning where it is a tensor."""
    return 1.0 if isinstance(parameter, Tensor) else float(parameter)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass through an operator on `tensors` may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def new_marks(x: Tensor, save: bool) -> Tensor:
    """Room for the membrane before every MARK-th token, (B, ceil(T / MARK), C); empty unless `save`."""
    batch, length, channels = x.shape
    shape = (batch, (length + MARK - 1) // MARK, channels) if save else (0,)
    return x.new_empty(shape, dtype=torch.float32)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each tensor as the kernels take it."""
    return [None if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op("spikescale::lif_forward", mutates_args=(), device_types="cpu")
def lif_forward(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    taus: Tensor | None,
    thresholds: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, final v, marks); marks are all that backward needs beside the inputs, empty unless `save`."""
    inputs = (*contiguous(x, v), as_bytes(reset), *contiguous(taus, thresholds))
    spikes, v_out = x.new_empty(x.shape), v.new_empty(v.shape)
    marks = new_marks(x, save)
    options = LifOptions(tau, v_threshold, v_reset, surrogate_alpha, soft_reset, detach_reset)
    _call("forward", backend, (*inputs, spikes, v_out, marks if save else None), x, options)
    return spikes, v_out, marks


@lif_forward.register_fake
def _(x: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    save = arguments[-2]
    return x.new_empty(x.shape), v.new_empty(v.shape), new_marks(x, save)


@torch.library.custom_op("spikescale::lif_backward", mutates_args=(), device_types="cpu")
def lif_backward(
    x: Tensor,
    reset: Tensor | None,
    taus: Tensor | None,
    thresholds: Tensor | None,
    marks: Tensor,
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    tau: float,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in its dtype), of the initial v, of taus and thresholds (empty unless `parameters`)."""
    inputs = (*contiguous(x), as_bytes(reset), *contiguous(taus, thresholds, marks, grad_spikes, grad_v))
    batch, _, channels = x.shape
    grad_x, grad_v0 = x.new_empty(x.shape), marks.new_empty(batch, channels)
    grad_tau, grad_threshold = (marks.new_empty(channels if parameters else 0) for _ in range(2))
    sums = (grad_tau, grad_threshold) if parameters else (None, None)
    options = LifOptions(tau, v_threshold, v_reset, surrogate_alpha, soft_reset, detach_reset)
    _call("backward", backend, (*inputs, grad_x, grad_v0, *sums), x, options)
    return grad_x, grad_v0, grad_tau, grad_threshold


@lif_backward.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, channels = x.shape

    def new(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    learned = channels if arguments[-2] else 0
    return x.new_empty(x.shape), new(batch, channels), new(learned), new(learned)


def _call(
    direction: str, backend: str, tensors: tuple[Tensor | None, ...], x: Tensor, options: LifOptions
) -> None:
    suffix = "bf16" if x.dtype == torch.bfloat16 else "f32"
    function = getattr(library(backend), f"lif_{direction}_{suffix}")
    function(*(pointer(tensor) for tensor in tensors), *x.shape, options, torch.get_num_threads())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, reset, taus, thresholds, *options, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, reset, taus, thresholds, output[2])
    ctx.options, ctx.backend = options, backend


def _backward(
    ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, *others = ctx.saved_tensors
    nothing = (None,) * 8
    if grad_spikes is None and grad_v is None:
        return (None,) * 5 + nothing
    if grad_spikes is None:
        grad_spikes = torch.zeros_like(x)
    parameters = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    grad_x, grad_v0, grad_tau, grad_threshold = lif_backward(
        x, *others, grad_spikes, grad_v, *ctx.options, parameters, ctx.backend
    )
    sums = (
        grad_tau if ctx.needs_input_grad[3] else None,
        grad_threshold if ctx.needs_input_grad[4] else None,
    )
    return (grad_x, grad_v0, None, *sums, *nothing)


lif_forward.register_autograd(_backward, setup_context=_setup_context)
