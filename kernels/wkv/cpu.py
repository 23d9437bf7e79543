"""WKV on CPU: `cpu.cpp` bound with ctypes, registered as torch operators.

`spikescale::wkv_forward` and `spikescale::wkv_backward` have fake implementations and an autograd
formula, so `torch.compile` and activation checkpointing treat them like any torch operator. Their last
argument is the backend, "cpu-avx512", "cpu-avx2" or "cpu-plain".
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikescale.kernels.cpu import load_for, pointer
from spikescale.kernels.masks import as_bytes

CHUNK = 16  # tokens between two marks, as in wkv_state.h


@functools.cache
def library(backend: str) -> ctypes.CDLL:
    """The kernels compiled for `backend`, built at the first call. Raises BuildError."""
    lib = load_for(backend, Path(__file__).with_name("cpu.cpp"))
    sizes = [ctypes.c_int64] * 3
    for suffix in ("f32", "bf16"):
        for direction, tensors in (("forward", 10), ("backward", 16)):
            function = getattr(lib, f"wkv_{direction}_{suffix}")
            function.argtypes = [ctypes.c_void_p] * tensors + [*sizes, ctypes.c_int32]
            function.restype = None
    assert lib.wkv_chunk() == CHUNK
    return lib


def wkv_cpu(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(y, final state), as `spikescale.kernels.wkv.wkv`.

    w, u, state float32; k, v, gate of one dtype, float32 or bfloat16; any strides.
    """
    differentiable = (x for x in (w, u, k, v, state, gate) if x is not None)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    y, state_out, _ = wkv_forward(w, u, k, v, state, reset, gate, save, backend)
    return y, state_out


def _call(
    direction: str, backend: str, dtype: torch.dtype, tensors: tuple[Tensor | None, ...], shape: torch.Size
) -> None:
    suffix = "bf16" if dtype == torch.bfloat16 else "f32"
    function = getattr(library(backend), f"wkv_{direction}_{suffix}")
    function(*(pointer(tensor) for tensor in tensors), *shape, torch.get_num_threads())


def _new_marks(k: Tensor, save: bool) -> Tensor:
    batch, length, channels = k.shape
    shape = (batch, (length + CHUNK - 1) // CHUNK, 4, channels) if save else (0,)
    return k.new_empty(shape, dtype=torch.float32)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op("spikescale::wkv_forward", mutates_args=(), device_types="cpu")
def wkv_forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, marks).

    Marks, (B, ceil(T / CHUNK), 4, C), are the running sums before every CHUNK-th token: all that backward
    needs beside the inputs. Empty unless `save`.
    """
    w, u, k, v, state = (x.contiguous() for x in (w, u, k, v, state))
    gate = _contiguous(gate)
    y, state_out, marks = torch.empty_like(v), torch.empty_like(state), _new_marks(k, save)
    tensors = (w, u, k, v, state, as_bytes(reset), gate, y, state_out, marks if save else None)
    _call("forward", backend, k.dtype, tensors, k.shape)
    return y, state_out, marks


@wkv_forward.register_fake
def _(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    return y, torch.empty_like(state, memory_format=torch.contiguous_format), _new_marks(k, save)


@torch.library.custom_op("spikescale::wkv_backward", mutates_args=(), device_types="cpu")
def wkv_backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    marks: Tensor,
    state_out: Tensor,
    grad_y: Tensor,
    grad_state_out: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w, u (float32), k, v, gate (in their dtype) and the initial state (float32; 0 for m).

    That of the gate is empty without one.
    """
    w, u, k, v, grad_y = (x.contiguous() for x in (w, u, k, v, grad_y))
    gate, grad_state_out = _contiguous(gate), _contiguous(grad_state_out)
    batch, _, channels = k.shape
    # One row a sequence, in double: the sum over batch and time does not depend on the threads.
    grad_w = torch.empty(batch, channels, dtype=torch.float64)
    grad_u = torch.empty_like(grad_w)
    grad_k, grad_v, grad_state = torch.empty_like(k), torch.empty_like(v), torch.empty_like(state_out)
    grad_gate = None if gate is None else torch.empty_like(gate)
    inputs = (w, u, k, v, as_bytes(reset), gate, marks, state_out, grad_y, grad_state_out)
    outputs = (grad_w, grad_u, grad_k, grad_v, grad_gate, grad_state)
    _call("backward", backend, k.dtype, (*inputs, *outputs), k.shape)
    grads = (grad_w.sum(0).float(), grad_u.sum(0).float(), grad_k, grad_v)
    return *grads, v.new_empty(0) if grad_gate is None else grad_gate, grad_state


@wkv_backward.register_fake
def _(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    marks: Tensor,
    state_out: Tensor,
    grad_y: Tensor,
    grad_state_out: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    grad_gate = v.new_empty(0) if gate is None else like(gate)
    return like(w), like(u), like(k), like(v), grad_gate, like(state_out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    w, u, k, v, _, reset, gate, _, ctx.backend = inputs
    _, state_out, marks = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(marks)
    ctx.save_for_backward(w, u, k, v, reset, gate, marks, state_out)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    if grad_y is None and grad_state is None:
        return (None,) * 9
    w, u, k, v, reset, gate, marks, state_out = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(v)
    *grads, grad_gate, grad_initial = wkv_backward(
        w, u, k, v, reset, gate, marks, state_out, grad_y, grad_state, ctx.backend
    )
    return *grads, grad_initial, None, None if gate is None else grad_gate, None, None


wkv_forward.register_autograd(_backward, setup_context=_setup_context)
