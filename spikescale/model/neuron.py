"""What can stand where a neuron stands: LIF, a bare step, or nothing.

All three are called as `spikes, v = neuron(x, v, reset)` with x (B, T, C), and carry `stateful`:
whether `v` (B, C) is a membrane to be kept between calls (None otherwise).
"""

import torch
from torch import Tensor, nn

from spikescale.config.schema import NeuronConfig
from spikescale.kernels.lif import lif
from spikescale.kernels.surrogate import heaviside


class Neuron(nn.Module):
    """Base of the neurons that fire: records firing rates while `monitor` is on.

    `channel_rates` is the mean over batch and time of the spikes of the last call, float32 (C,) on their
    device, and `firing_rate` the mean of that, a scalar; NaN before the first monitored call.
    """

    stateful = False
    channel_rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.monitor = False
        self.channel_rates = torch.full((1,), torch.nan, device="cpu")

    @property
    def firing_rate(self) -> Tensor:
        """Mean over the channels, a float32 scalar."""
        return self.channel_rates.mean()

    def record(self, spikes: Tensor) -> None:
        """Keep the firing rates of `spikes` (B, T, C) if they are monitored."""
        if self.monitor:
            self.channel_rates = spikes.detach().float().flatten(0, -2).mean(0)


class LIF(Neuron):
    """Leaky integrate-and-fire neurons, one per channel, along the token axis (SpikeGPT Sec. 3.2)."""

    stateful = True

    def __init__(self, config: NeuronConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend = backend

    def forward(self, x: Tensor, v: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Spikes (B, T, C) in x's dtype and the final membrane (B, C)."""
        config = self.config
        spikes, v = lif(
            x,
            v,
            tau=config.tau,
            v_threshold=config.v_threshold,
            v_reset=config.v_reset,
            soft_reset=config.soft_reset,
            detach_reset=config.detach_reset,
            surrogate_alpha=config.surrogate_alpha,
            reset=reset,
            backend=self.backend,
        )
        self.record(spikes)
        return spikes, v

    def is_observed(self) -> bool:
        """Whether something hangs on this module's call, so that its spikes must not be fused away."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks)

    def record_firing(self, x: Tensor, v: Tensor | None, reset: Tensor | None) -> None:
        """Record the firing rate that a call would, if it is monitored: for fused neurons."""
        if self.monitor:
            with torch.no_grad():
                self(x, v, reset)

    def extra_repr(self) -> str:
        """Shown in the model's printout."""
        return f"tau={self.config.tau}, v_threshold={self.config.v_threshold}"


class Heaviside(Neuron):
    """Spikes where x >= 0, with the ATan surrogate gradient and no membrane."""

    def __init__(self, config: NeuronConfig) -> None:
        super().__init__()
        self.alpha = config.surrogate_alpha

    def forward(self, x: Tensor, v: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Spikes in x's shape and dtype, and None."""
        spikes = heaviside(x, self.alpha)
        self.record(spikes)
        return spikes, None


class NoNeuron(nn.Module):
    """Passes x through: a model without spikes."""

    stateful = False

    def forward(self, x: Tensor, v: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x unchanged, and None."""
        return x, None
