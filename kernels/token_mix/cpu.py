"""Token shift and its mixtures on CPU: `cpu.cpp` bound with ctypes, registered as torch operators."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikescale.kernels.cpu import load_for, pointer, pointers
from spikescale.kernels.masks import as_bytes

PIECE = 64  # tokens whose contributions to a mu's gradient are summed in float32, as in cpu.cpp


@functools.cache
def library(backend: str) -> ctypes.CDLL:
    """The kernels compiled for `backend`, built at the first call. Raises BuildError."""
    lib = load_for(backend, Path(__file__).with_name("cpu.cpp"))
    sizes = [*[ctypes.c_int64] * 3, ctypes.c_int32, ctypes.c_int32]
    lib.token_mix_forward.argtypes = [ctypes.c_int32, *[ctypes.c_void_p] * 5, *sizes]
    lib.token_mix_backward.argtypes = [ctypes.c_int32, *[ctypes.c_void_p] * 8, *sizes]
    for function in (lib.token_mix_forward, lib.token_mix_backward):
        function.restype = None
    assert lib.token_mix_piece() == PIECE
    return lib


def _kind(x: torch.dtype, out: torch.dtype) -> int:
    return 2 * (x == torch.bfloat16) + (out == torch.bfloat16)


def token_mix_cpu(
    x: Tensor, mus: list[Tensor], last: Tensor, reset: Tensor | None, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """As `token_mix`, for CPU tensors; outputs of another dtype than float32 and bfloat16 are converted."""
    out = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    return [mixed.to(dtype) for mixed in token_mix_forward(x, mus, last, reset, out, backend)]


@torch.library.custom_op("spikescale::token_mix_forward", mutates_args=(), device_types="cpu")
def token_mix_forward(
    x: Tensor, mus: Sequence[Tensor], last: Tensor, reset: Tensor | None, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """One (B, T, C) tensor of `dtype` (float32 or bfloat16) for each of `mus`."""
    x, last, reset = x.contiguous(), last.contiguous(), as_bytes(reset)
    mus = [mu.contiguous() for mu in mus]
    out = [torch.empty_like(x, dtype=dtype) for _ in mus]
    library(backend).token_mix_forward(
        _kind(x.dtype, dtype),
        pointer(x),
        pointers(mus),
        pointer(last),
        pointer(reset),
        pointers(out),
        *x.shape,
        len(mus),
        torch.get_num_threads(),
    )
    return out


@token_mix_forward.register_fake
def _(
    x: Tensor, mus: Sequence[Tensor], last: Tensor, reset: Tensor | None, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    return [torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for _ in mus]


@torch.library.custom_op("spikescale::token_mix_backward", mutates_args=(), device_types="cpu")
def token_mix_backward(
    x: Tensor,
    mus: Sequence[Tensor],
    last: Tensor,
    reset: Tensor | None,
    grads: Sequence[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (its dtype), of all of `mus` (N, C) and of last (B, C), both float32."""
    x, last, reset = x.contiguous(), last.contiguous(), as_bytes(reset)
    mus, grads = [mu.contiguous() for mu in mus], [grad.contiguous() for grad in grads]
    batch, length, channels = x.shape
    pieces = batch * -(-length // PIECE)
    grad_x, grad_last = torch.empty_like(x), torch.empty_like(last)
    grad_mu = torch.empty(pieces, len(mus), channels)
    library(backend).token_mix_backward(
        _kind(x.dtype, grads[0].dtype),
        pointer(x),
        pointers(mus),
        pointer(last),
        pointer(reset),
        pointers(grads),
        pointer(grad_x),
        pointer(grad_mu),
        pointer(grad_last),
        *x.shape,
        len(mus),
        torch.get_num_threads(),
    )
    return grad_x, grad_mu.sum(0, dtype=torch.float64).float(), grad_last


@token_mix_backward.register_fake
def _(
    x: Tensor,
    mus: Sequence[Tensor],
    last: Tensor,
    reset: Tensor | None,
    grads: Sequence[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    grad_mu = mus[0].new_empty(len(mus), x.shape[2])
    return (
        torch.empty_like(x, memory_format=contiguous),
        grad_mu,
        torch.empty_like(last, memory_format=contiguous),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, mus, last, reset, dtype, backend = inputs
    ctx.save_for_backward(x, last, reset, *mus)
    ctx.dtype, ctx.backend = dtype, backend


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, last, reset, *mus = ctx.saved_tensors
    present = [grad for grad in grads if grad is not None]
    if not present:
        return (None,) * 6
    given = [torch.zeros_like(present[0]) if grad is None else grad for grad in grads]
    grad_x, grad_mu, grad_last = token_mix_backward(x, mus, last, reset, given, ctx.backend)
    return grad_x, list(grad_mu.unbind(0)), grad_last, None, None, None


token_mix_forward.register_autograd(_backward, setup_context=_setup_context)
