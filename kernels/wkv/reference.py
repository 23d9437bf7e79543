"""WKV, the definition: one torch operation after another, differentiated by autograd.

SpikeGPT Eqs. 8-9 (with K[t] where Eq. 9 prints K[t-1]), which is RWKV-4's recurrence. Per channel

    y[t] = (sum_{i<t} e^{(t-1-i) w + k[i]} v[i] + e^{u + k[t]} v[t]) / (the same sum without v)

carried as (a, b, m): the sums over the past are a e^m with v and b e^m without.
"""

import torch
from torch import Tensor

EMPTY_EXPONENT = -1e38  # m of a state that has seen nothing


def initial_state(
    batch: int, channels: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The state (batch, 3, channels) before the first token: a = b = 0, m = -1e38."""
    state = torch.zeros(batch, 3, channels, device=device, dtype=dtype)
    state[:, 2] = EMPTY_EXPONENT
    return state


def wkv_reference(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapes as for `wkv`; computed in float64 whatever the inputs are, so that it can judge the others.

    The exponent m is only a common scale of a and b: outputs do not depend on it, so it carries no
    gradient. Every exponent below is <= 0 because m is a running maximum.
    """
    out_dtype, state_dtype = v.dtype, state.dtype
    w, u, k, v, state = (x.double() for x in (w, u, k, v, state))
    a, b, m = state[:, 0], state[:, 1], state[:, 2].detach()
    outputs = []
    for t in range(k.shape[1]):
        k_t, v_t = k[:, t], v[:, t]
        if reset is not None:
            emptied = reset[:, t, None]
            a, b = a.masked_fill(emptied, 0.0), b.masked_fill(emptied, 0.0)
            m = m.masked_fill(emptied, EMPTY_EXPONENT)
        # Output: the past and the current token with its bonus.
        top = torch.maximum(m, u + k_t).detach()
        past, now = torch.exp(m - top), torch.exp(u + k_t - top)
        outputs.append((past * a + now * v_t) / (past * b + now))
        # Update: decay by one token, then add the current one without the bonus.
        top = torch.maximum(m + w, k_t).detach()
        past, now = torch.exp(m + w - top), torch.exp(k_t - top)
        a, b, m = past * a + now * v_t, past * b + now, top
    # Rounding m to the state's dtype is made good in a and b. An empty state has nothing to make good,
    # and its -1e38 rounds by more than an exponent can hold.
    m_out = m.to(state_dtype).double()
    scale = torch.exp((m - m_out).masked_fill(m <= EMPTY_EXPONENT / 2, 0.0))
    final = torch.stack([a * scale, b * scale, m_out], dim=1).to(state_dtype)
    y = torch.stack(outputs, dim=1)
    if gate is not None:
        y = y * torch.sigmoid(gate.double())
    return y.to(out_dtype), final
