"""Graded spikes: a neuron that fires 0, 1, ..., L at once, or with a sign from -L to L.

    h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau
    s[t] = the number of k in 1..L with h[t] >= k v_threshold          (soft reset: > in place of >=)
           signed: less the number of k in 1..L with -h[t] >= k v_threshold
    v[t] = v_reset where s[t] is not 0, else h[t]                      (soft reset: h[t] - v_threshold s[t])

With L = 1 and no sign this is `lif`. A neuromorphic chip carries s as the payload of a spike (Orchard et al.
2021; named in SpikeGPT Sec. 3.7); signed spikes with L = 1 are SpikeLM's (Xing et al. 2024) without its
amplitude. Every step's derivative is the ATan surrogate at its own threshold. On CPUs it is C++
(`graded.cpp`), on GPUs Triton (`triton_graded.py`); in float64, and where neither can be had, what depends on
the token before is a loop of torch's operators, and all else is done for all tokens at once.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikescale.kernels.backend import choose_backend
from spikescale.kernels.build import BuildError
from spikescale.kernels.compiling import not_compiled
from spikescale.kernels.surrogate import atan_derivative, heaviside

logger = logging.getLogger("spikescale.kernels")


def graded_lif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    levels: int,
    signed: bool = False,
    tau: float | Tensor = 2.0,
    v_threshold: float | Tensor = 1.0,
    v_reset: float = 0.0,
    soft_reset: bool = False,
    detach_reset: bool = False,
    surrogate_alpha: float = 2.0,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Graded spikes (B, T, C) in x's dtype, whole numbers up to `levels`, and the final membrane (B, C).

    Arguments as for `lif`. A backend is one of `lif`'s: "auto" falls back to a slow loop of torch's operators
    where there is no kernel, which it says once. The membrane is float32 (float64 for float64 x). A NaN
    membrane gives a NaN spike. Raises ValueError for shapes that do not match or fewer levels than one,
    UserError for a named backend that cannot serve these tensors.
    """
    if levels < 1 or x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, time, channels), levels >= 1, not {tuple(x.shape)}, {levels}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if v is None:
        v = torch.zeros(x.shape[0], x.shape[2], dtype=dtype, device=x.device)
    options = (levels, signed, v_reset, soft_reset, detach_reset, surrogate_alpha)
    spikes, v = _run(x, v, reset, tau, v_threshold, options, backend)
    return spikes.to(x.dtype), v


@not_compiled  # of what it may run, a loop over tokens is not worth unrolling into a graph
def _run(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    tau: float | Tensor,
    v_threshold: float | Tensor,
    options: tuple[int, bool, float, bool, bool, float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    # The C++ has float32 only, to which every narrower dtype widens without loss.
    narrow = x.device.type == "cpu" and backend != "triton" and x.dtype != torch.float64
    chosen = choose_backend("lif", backend, x.device.type, torch.float32 if narrow else x.dtype)
    if chosen == "triton":
        from spikescale.kernels.lif.graded_triton import graded_lif_triton

        return graded_lif_triton(x, v, reset, tau, v_threshold, options)
    wide = x.to(v.dtype)
    taus, thresholds = (torch.as_tensor(p, dtype=v.dtype, device=x.device) for p in (tau, v_threshold))
    if backend == "reference":
        return _definition(wide, v, reset, taus, thresholds, *options)
    if chosen != "reference" and _built(chosen, backend):
        from spikescale.kernels.lif.graded_cpu import CompiledGradedLIF

        each = (parameter.expand(x.shape[-1]) for parameter in (taus, thresholds))
        return CompiledGradedLIF.apply(wide, v, reset, *each, options, chosen)
    _say_slow(x.device.type, x.dtype)
    return _Composed.apply(wide, v, reset, taus, thresholds, options)


def _built(chosen: str, asked: str) -> bool:
    """Whether the C++ is there; it is another file than that of `lif`. Raises BuildError if asked for."""
    from spikescale.kernels.lif.graded_cpu import library

    try:
        library(chosen)
    except BuildError:
        if asked != "auto":
            raise
        return False
    return True


def _steps(h: Tensor, threshold: Tensor, levels: int, signed: bool, alpha: float, strict: bool) -> Tensor:
    """The graded spikes of membranes h."""
    up = sum(heaviside(h - k * threshold, alpha, strict) for k in range(1, levels + 1))
    assert isinstance(up, Tensor)
    if not signed:
        return up
    return up - sum(heaviside(-h - k * threshold, alpha, strict) for k in range(1, levels + 1))


def _definition(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    tau: Tensor,
    threshold: Tensor,
    levels: int,
    signed: bool,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    spikes = []
    for t in range(x.shape[1]):
        if reset is not None:
            v = v.masked_fill(reset[:, t, None], 0.0)
        h = v + (x[:, t] - (v - v_reset)) / tau
        s = _steps(h, threshold, levels, signed, alpha, strict=soft_reset)
        spikes.append(s)
        if soft_reset:
            v = h - (s.detach() if detach_reset else s) * threshold
            continue
        # Whether it fired, whichever the sign: with a sign the two first steps exclude one another.
        fired = heaviside(h - threshold, alpha)
        if signed:
            fired = fired + heaviside(-h - threshold, alpha)
        fired = fired.detach() if detach_reset else fired
        v = h * (1 - fired) + v_reset * fired
    return torch.stack(spikes, dim=1), v


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        reset: Tensor | None,
        tau: Tensor,
        threshold: Tensor,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        levels, signed, v_reset, soft_reset, _, alpha = options
        ctx.options = options
        v0, membranes = v, []
        for t, current in enumerate(x.unbind(1)):
            if reset is not None:
                v = v.masked_fill(reset[:, t, None], 0.0)
            h = v + (current - (v - v_reset)) / tau
            membranes.append(h)
            if soft_reset:
                v = h - _steps(h, threshold, levels, signed, alpha, strict=True) * threshold
            else:
                v = torch.where((h.abs() if signed else h) - threshold >= 0, v_reset, h)
        h = torch.stack(membranes, dim=1)
        ctx.save_for_backward(x, v0, reset, tau, threshold, h)
        return _steps(h, threshold, levels, signed, alpha, strict=soft_reset), v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        x, v0, reset, tau, threshold, h = ctx.saved_tensors
        levels, signed, v_reset, soft_reset, detach_reset, alpha = ctx.options
        # The derivatives of the spike by membrane and threshold, and of whether it fired by both.
        slope, by_threshold = torch.zeros_like(h), torch.zeros_like(h)
        for k in range(1, levels + 1):
            up = atan_derivative(h - k * threshold, alpha)
            slope += up
            by_threshold -= k * up
            if signed:
                down = atan_derivative(-h - k * threshold, alpha)
                slope += down
                by_threshold += k * down
        spikes = _steps(h, threshold, levels, signed, alpha, strict=soft_reset)
        if soft_reset:
            after = h - spikes * threshold
            carried = torch.ones_like(h) if detach_reset else 1 - threshold * slope
            threshold_carried = -spikes if detach_reset else -spikes - threshold * by_threshold
        else:
            fired = (spikes != 0).to(h.dtype)
            after = h * (1 - fired) + v_reset * fired
            first = atan_derivative(h - threshold, alpha)
            second = atan_derivative(-h - threshold, alpha) if signed else torch.zeros_like(h)
            kept = 0.0 if detach_reset else v_reset - h
            carried = 1 - fired + kept * (first - second)
            threshold_carried = -kept * (first + second) if not detach_reset else torch.zeros_like(h)
        before = torch.cat([v0[:, None], after[:, :-1]], dim=1)
        if reset is not None:
            before = before.masked_fill(reset[..., None], 0.0)
        from_spikes, leak = grad_spikes * slope, 1 - 1 / tau
        at_h, at_v, gradient = [], [], grad_v
        for t in range(x.shape[1] - 1, -1, -1):
            at_v.append(gradient)
            at_h.append(from_spikes[:, t] + gradient * carried[:, t])
            gradient = at_h[-1] * leak
            if reset is not None:
                gradient = gradient.masked_fill(reset[:, t, None], 0.0)
        grad_h, later = (torch.stack(parts[::-1], dim=1) for parts in (at_h, at_v))
        grad_x = grad_h / tau
        grad_tau = -(grad_x * (x - (before - v_reset)) / tau)
        grad_threshold = grad_spikes * by_threshold + later * threshold_carried
        wanted = ctx.needs_input_grad
        return (
            grad_x,
            gradient,
            None,
            _summed(grad_tau, tau) if wanted[3] else None,
            _summed(grad_threshold, threshold) if wanted[4] else None,
            None,
        )


def _summed(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one value, or one a channel."""
    return gradient.sum() if parameter.dim() == 0 else gradient.flatten(0, -2).sum(0)


@functools.cache
def _say_slow(device: str, dtype: torch.dtype) -> None:
    logger.warning(
        "graded spikes: no kernel for %s tensors on %s, a slow loop of torch's operators runs",
        str(dtype).removeprefix("torch."),
        device,
    )
