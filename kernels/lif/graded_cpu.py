"""Graded neurons on CPU: `graded.cpp` bound with ctypes, differentiated once."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikescale.kernels.cpu import load_for, pointer
from spikescale.kernels.masks import as_bytes


class GradedOptions(ctypes.Structure):
    """The C struct `Options`."""

    _fields_ = (
        ("v_reset", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("levels", ctypes.c_int32),
        ("soft_reset", ctypes.c_int32),
        ("is_signed", ctypes.c_int32),
        ("detach_reset", ctypes.c_int32),
    )


@functools.cache
def library(backend: str) -> ctypes.CDLL:
    """The kernels compiled for one of CPU_BACKENDS, built at the first call. Raises BuildError."""
    found = load_for(backend, Path(__file__).with_name("graded.cpp"))
    for name, tensors in (("forward", 8), ("backward", 12)):
        function = getattr(found, f"graded_{name}")
        sizes = [ctypes.c_int64] * 3
        function.argtypes = [*[ctypes.c_void_p] * tensors, *sizes, GradedOptions, ctypes.c_int32]
        function.restype = None
    return found


class CompiledGradedLIF(torch.autograd.Function):
    """(spikes, final v) of x (B, T, C), v (B, C), reset, tau and threshold (C,), float32 all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        reset: Tensor | None,
        tau: Tensor,
        threshold: Tensor,
        options: tuple[Any, ...],
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """`options`: levels, signed, v_reset, soft_reset, detach_reset, surrogate_alpha."""
        ctx.backend = backend
        levels, signed, v_reset, soft_reset, detach_reset, alpha = options
        ctx.options = GradedOptions(v_reset, alpha, levels, soft_reset, signed, detach_reset)
        x, v, tau, threshold = (tensor.contiguous() for tensor in (x, v, tau, threshold))
        h, spikes, end = torch.empty_like(x), torch.empty_like(x), torch.empty_like(v)
        _call(backend, "forward", (x, v, as_bytes(reset), tau, threshold, h, spikes, end), x, ctx.options)
        ctx.save_for_backward(x, v, reset, tau, threshold, h)
        return spikes, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, v, tau and threshold."""
        x, v, reset, tau, threshold, h = ctx.saved_tensors
        grad_x, grad_v0 = torch.empty_like(x), torch.empty_like(v)
        sums = [torch.zeros(v.shape, dtype=torch.float64) for _ in range(2)]
        given = (x, v, as_bytes(reset), tau, threshold, h, grad_spikes.contiguous(), grad_v.contiguous())
        _call(ctx.backend, "backward", (*given, grad_x, grad_v0, *sums), x, ctx.options)
        grad_tau, grad_threshold = (rows.sum(0).float() for rows in sums)
        return grad_x, grad_v0, None, grad_tau, grad_threshold, None, None


def _call(
    backend: str, name: str, tensors: tuple[Tensor | None, ...], x: Tensor, options: GradedOptions
) -> None:
    function = getattr(library(backend), f"graded_{name}")
    function(*(pointer(tensor) for tensor in tensors), *x.shape, options, torch.get_num_threads())
