"""WKV, the time mixing of RWKV-4 that SpikeGPT uses in place of attention: `wkv`."""

import torch
from torch import Tensor

from spikescale.kernels.backend import choose_backend
from spikescale.kernels.compiling import not_compiled
from spikescale.kernels.wkv.reference import initial_state, wkv_reference

__all__ = ["initial_state", "wkv"]


def wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Average of the values so far, weighted by their keys and by an exponential decay, per channel.

        y[t] = ( sum_{i<t} e^{(t-1-i) w + k[i]} v[i] + e^{u + k[t]} v[t] ) / ( the same sum without v )

    SpikeGPT Eqs. 8-9. Everything inside is at least float32 whatever the inputs are.

    Args:
        w: (C,) log of the decay per token, <= 0 (-exp(time_decay)).
        u: (C,) bonus of the current token (time_first).
        k, v: (B, T, C) float32, bfloat16, float16 or float64, T >= 1.
        state: (B, 3, C) rows a, b, m: the sums over the past are a e^m (with v) and b e^m (without);
            float32, float64 for float64 v; None: `initial_state`.
        reset: (B, T) bool; where true the state is emptied before that token.
        gate: (B, T, C) in v's dtype, the receptance: y is multiplied by sigmoid(gate) before it is rounded.
        backend: see `spikescale.kernels.backend`.

    Returns:
        y (B, T, C) in v's dtype, and the state (B, 3, C) after the last token. Gradients flow through the
        rows a and b of both states; m is a common scale without influence, and carries none.

    Raises:
        UserError: the backend is unknown, or cannot serve these tensors.
        ValueError: shapes or dtypes do not match.
    """
    if k.dim() != 3 or k.shape != v.shape or k.shape[1] == 0:
        raise ValueError(
            f"k and v must be (batch, time, channels) with time >= 1, not {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch, _, channels = k.shape
    if w.shape != (channels,) or u.shape != (channels,):
        raise ValueError(f"w and u must be ({channels},), not {tuple(w.shape)}, {tuple(u.shape)}")
    dtype = torch.promote_types(k.dtype, v.dtype)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if state is None:
        state = initial_state(batch, channels, k.device, state_dtype)
    if state.shape != (batch, 3, channels) or state.dtype != state_dtype:
        raise ValueError(
            f"state must be {(batch, 3, channels)} {state_dtype}, not {tuple(state.shape)} {state.dtype}"
        )
    if reset is not None and (reset.shape != k.shape[:2] or reset.dtype != torch.bool):
        raise ValueError(f"reset must be {tuple(k.shape[:2])} bool, not {tuple(reset.shape)} {reset.dtype}")
    w, u = w.to(state_dtype), u.to(state_dtype)
    if gate is not None and (gate.shape != v.shape or gate.dtype != v.dtype):
        raise ValueError(f"gate must be {tuple(v.shape)} {v.dtype}, not {tuple(gate.shape)} {gate.dtype}")
    chosen = choose_backend("wkv", backend, k.device.type, dtype)
    if chosen == "reference":
        return _reference(w, u, k, v, state, reset, gate)
    k, wide_v = k.to(dtype), v.to(dtype)
    wide_gate = None if gate is None else gate.to(dtype)
    if chosen == "triton":
        from spikescale.kernels.wkv.triton import wkv_triton

        y, state = wkv_triton(w, u, k, wide_v, state, reset, wide_gate)
    else:
        from spikescale.kernels.wkv.cpu import wkv_cpu

        y, state = wkv_cpu(w, u, k, wide_v, state, reset, wide_gate, chosen)
    return y.to(v.dtype), state


# A loop over tokens is not worth unrolling into a graph.
_reference = not_compiled(wkv_reference)
