"""The membranes of neurons that have fired, which no kernel keeps."""

import torch
from torch import Tensor

from spikescale.model.neuron import LIF


@torch.no_grad()
def membranes(
    neuron: LIF, x: Tensor, v: Tensor | None, reset: Tensor | None, spikes: Tensor
) -> tuple[Tensor, Tensor]:
    """(h, v): membranes (B, T, C) before each token's reset, and the final ones (B, C), float32.

    x, v, reset: what the neuron was called with; `spikes`: what it answered. The operations are those of
    `lif_reference` in its order, so h crosses the threshold at the spikes and nowhere else.
    """
    config = neuron.config
    tau, threshold = neuron.constants()
    current, fired = neuron.current(x).float(), spikes.float()
    if v is None:
        v = current.new_zeros(x.shape[0], x.shape[2])
    found = torch.empty_like(current)
    for t in range(x.shape[1]):
        if reset is not None:
            v = v.masked_fill(reset[:, t, None], 0.0)
        h = v + (current[:, t] - (v - config.v_reset)) / tau
        found[:, t] = h
        if config.soft_reset:
            v = h - fired[:, t] * threshold
        else:
            v = torch.where(fired[:, t] != 0, config.v_reset, h)
    return found, v
