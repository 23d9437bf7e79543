"""LayerNorm, alone or fused with the neurons and the sum before it; the grid of the residual stream."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikescale.config.schema import NeuronConfig
from spikescale.kernels.layer_norm import layer_norm
from spikescale.kernels.lif_norm import lif_residual_norm


@dataclass(frozen=True)
class Firing:
    """Neurons that have been driven and not yet fired: their spikes are still to be added to the stream.

    `current` (B, T, C), `v` (B, C) before the first token, `reset` (B, T) bool or None; `dropout` is applied
    to the sum with `seed`.
    """

    current: Tensor
    v: Tensor
    reset: Tensor | None
    config: NeuronConfig
    dropout: float
    seed: int


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed and returned in its weights' dtype, whatever autocast does."""

    def __init__(self, width: int, backend: str = "auto") -> None:
        super().__init__(width)
        self.backend = backend

    # Neurons are passed into the call, and not the weights out of the module, because ZeRO 3 gathers a
    # module's weights when it is called.
    def forward(  # type: ignore[override]
        self, x: Tensor, firing: Firing | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """x normalised over the last dimension; with `firing`, (the sum, it normalised, final membrane)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            if firing is None:
                return layer_norm(x, self.weight, self.bias, self.eps, self.backend)
            total, normed, v = add_spikes(x, firing, self.weight, self.bias, self.eps, self.backend)
        assert normed is not None
        return total, normed, v


def add_spikes(
    x: Tensor,
    firing: Firing,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x + spikes after dropout, it normalised if there is a `weight`, final membrane)."""
    config = firing.config
    return lif_residual_norm(
        x,
        firing.current,
        firing.v,
        weight,
        bias,
        eps=eps,
        tau=config.tau,
        v_threshold=config.v_threshold,
        v_reset=config.v_reset,
        soft_reset=config.soft_reset,
        detach_reset=config.detach_reset,
        surrogate_alpha=config.surrogate_alpha,
        dropout=firing.dropout,
        seed=firing.seed,
        reset=firing.reset,
        backend=backend,
    )


def stream_grid(layers: int) -> float:
    """The spacing of the grid on which the residual stream of a spiking model of `layers` blocks lies.

    A power of two so small that rounding to it is of the order of float32's own, and so large that the
    stream, at most 2 spikes a block away from a start within +-16, is exact in float32: adding spikes never
    rounds, whatever the order, and the stream less its start is a small integer.
    """
    # Of float32's 24 bits, those that the largest stream takes are left of the point, and at least 6:
    # `on_grid` rounds numbers up to 2^22 spacings of the grid.
    return 2.0 ** (max(6, math.ceil(math.log2(2 * layers + 16))) - 24)


def on_grid(x: Tensor, layers: int) -> Tensor:
    """x rounded to multiples of `stream_grid(layers)`; its gradient is x's. float32 and float64 only."""
    # Near this number, floats are spaced by the grid.
    significand = 52 if x.dtype == torch.float64 else 23
    offset = 1.5 * 2.0**significand * stream_grid(layers)
    return (x + offset) - offset
