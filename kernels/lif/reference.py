"""Leaky integrate-and-fire neuron along the token axis, the definition: a plain torch loop.

SpikeGPT Eqs. 1-3 with the hard reset of the released code; the soft reset is Eqs. 19-20.
"""

import torch
from torch import Tensor

from spikescale.kernels.surrogate import heaviside


def lif_reference(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    tau: float | Tensor,
    v_threshold: float | Tensor,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
) -> tuple[Tensor, Tensor]:
    """Shapes and meaning as for `lif`; computed in v's dtype, spikes returned in x's.

    The order of the operations below fixes the rounding, and with it which neurons fire: every other
    implementation keeps it.
    """
    out_dtype = x.dtype
    x = x.to(v.dtype)
    spikes = []
    for t in range(x.shape[1]):
        if reset is not None:
            v = v.masked_fill(reset[:, t, None], 0.0)
        h = v + (x[:, t] - (v - v_reset)) / tau
        s = heaviside(h - v_threshold, surrogate_alpha, strict=soft_reset)
        spikes.append(s)
        fired = s.detach() if detach_reset else s
        v = h - fired * v_threshold if soft_reset else h * (1 - fired) + v_reset * fired
    return torch.stack(spikes, dim=1).to(out_dtype), v
