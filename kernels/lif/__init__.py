"""Leaky integrate-and-fire neuron along the token axis: `lif`, and with graded spikes `graded_lif`."""

import torch
from torch import Tensor

from spikescale.kernels.backend import choose_backend
from spikescale.kernels.compiling import not_compiled
from spikescale.kernels.lif.graded import graded_lif
from spikescale.kernels.lif.reference import lif_reference

__all__ = ["graded_lif", "lif"]


def lif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    tau: float | Tensor = 2.0,
    v_threshold: float | Tensor = 1.0,
    v_reset: float = 0.0,
    soft_reset: bool = False,
    detach_reset: bool = False,
    surrogate_alpha: float = 2.0,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Spikes of one neuron per channel, driven by `x` along time.

        h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau
        s[t] = 1 if h[t] - v_threshold >= 0 else 0             (soft reset: > in place of >=)
        v[t] = h[t] (1 - s[t]) + v_reset s[t]                  (soft reset: h[t] - v_threshold s[t])

    SpikeGPT Eqs. 1-3; soft reset Eqs. 19-20. Backward uses the ATan surrogate with `surrogate_alpha`,
    and flows through the reset unless `detach_reset`.

    Args:
        x: (B, T, C) float32, bfloat16, float16 or float64, T >= 1.
        v: (B, C) membrane before the first token, float32 (float64 for float64 x); None: zeros.
        tau: membrane time constant, in tokens, >= 1; a number, or one a channel (C,) in v's dtype.
        v_threshold: likewise. Where they are tensors, gradients flow to them: the threshold's through the
            surrogate, -ds/dh, and through the soft reset.
        reset: (B, T) bool; where true the membrane is set to 0 before that token.
        backend: see `spikescale.kernels.backend`.

    Returns:
        spikes (B, T, C) in x's dtype, exactly 0 or 1 (NaN where the membrane is NaN), and the final v
        (B, C). The membrane is float32 whatever x is (float64 for float64 x).

    Raises:
        UserError: the backend is unknown, or cannot serve these tensors.
        ValueError: shapes or dtypes do not match.
    """
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, time, channels) with time >= 1, not {tuple(x.shape)}")
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if v is None:
        v = torch.zeros(x.shape[0], x.shape[2], dtype=state_dtype, device=x.device)
    if v.shape != (x.shape[0], x.shape[2]) or v.dtype != state_dtype:
        raise ValueError(
            f"v must be {(x.shape[0], x.shape[2])} {state_dtype}, not {tuple(v.shape)} {v.dtype}"
        )
    if reset is not None and (reset.shape != x.shape[:2] or reset.dtype != torch.bool):
        raise ValueError(f"reset must be {tuple(x.shape[:2])} bool, not {tuple(reset.shape)} {reset.dtype}")
    for name, value in (("tau", tau), ("v_threshold", v_threshold)):
        if isinstance(value, Tensor) and (value.shape != x.shape[2:] or value.dtype != state_dtype):
            raise ValueError(
                f"{name} must be {tuple(x.shape[2:])} {state_dtype}, not {tuple(value.shape)} {value.dtype}"
            )
    options = (tau, v_threshold, v_reset, soft_reset, detach_reset, surrogate_alpha)
    chosen = choose_backend("lif", backend, x.device.type, x.dtype)
    if chosen == "reference":
        return _reference(x, v, reset, *options)
    if chosen == "triton":
        from spikescale.kernels.lif.triton import lif_triton

        return lif_triton(x, v, reset, *options)
    from spikescale.kernels.lif.cpu import lif_cpu

    return lif_cpu(x, v, reset, *options, chosen)


# A loop over tokens is not worth unrolling into a graph.
_reference = not_compiled(lif_reference)
