"""What can stand where a neuron stands: LIF, a bare step, or nothing.

All three are called as `spikes, v = neuron(x, v, reset)` with x (B, T, C), and carry `stateful`:
whether `v` (B, C) is a membrane to be kept between calls (None otherwise).
"""

from typing import Any

import torch
from torch import Tensor, nn

from spikescale.config.schema import NeuronConfig
from spikescale.kernels.lif import graded_lif, lif
from spikescale.kernels.surrogate import heaviside

CURRENT_EPS = 1e-6  # added to the mean square of currents that are normalised


class Neuron(nn.Module):
    """Base of the neurons that fire: records firing rates while `monitor` is on.

    `channel_rates` is the mean over batch and time of the spikes of the last call (of graded ones: of whether
    there was one), float32 (C,) on their device, and `firing_rate` the mean of that, a scalar; NaN before the
    first monitored call.
    """

    stateful = False
    binary = True  # spikes are 0 or 1
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
            fired = spikes.detach() if self.binary else spikes.detach() != 0
            self.channel_rates = fired.float().flatten(0, -2).mean(0)


class LIF(Neuron):
    """Leaky integrate-and-fire neurons, one per channel, along the token axis (SpikeGPT Sec. 3.2).

    Args:
        config: what kind; the options beyond SpikeGPT's are described there.
        width: number of channels (here, where a model is divided).
        backend: of the operator.

    With `learn_tau` the parameter `tau_logit` (C,) gives tau = 1 + exp(-tau_logit), and with
    `learn_threshold` the parameter `log_threshold` (C,) gives v_threshold = exp(log_threshold).
    """

    stateful = True

    def __init__(self, config: NeuronConfig, width: int, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.binary = config.bits == 1 and not config.signed
        if config.learn_tau:
            self.tau_logit = nn.Parameter(torch.empty(width))
        if config.learn_threshold:
            self.log_threshold = nn.Parameter(torch.empty(width))

    def constants(self) -> tuple[float | Tensor, float | Tensor]:
        """(tau, v_threshold): numbers, or what has been learnt, (C,)."""
        config = self.config
        tau = 1 + torch.exp(-self.tau_logit) if config.learn_tau else config.tau
        threshold = torch.exp(self.log_threshold) if config.learn_threshold else config.v_threshold
        return tau, threshold

    def current(self, x: Tensor) -> Tensor:
        """What drives the membrane when x (B, T, C) arrives."""
        if not self.config.normalise_current:
            return x
        # In float32 whatever x is: a mean of squares of bfloat16 loses what the threshold decides on.
        wide = x if x.dtype == torch.float64 else x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + CURRENT_EPS)

    def forward(self, x: Tensor, v: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Spikes (B, T, C) in x's dtype and the final membrane (B, C)."""
        config = self.config
        tau, threshold = self.constants()
        options: dict[str, Any] = {
            "v_reset": config.v_reset,
            "soft_reset": config.soft_reset,
            "detach_reset": config.detach_reset,
            "surrogate_alpha": config.surrogate_alpha,
        }
        current = self.current(x)
        if self.binary:
            spikes, v = lif(
                current, v, tau=tau, v_threshold=threshold, reset=reset, backend=self.backend, **options
            )
        else:
            spikes, v = graded_lif(
                current,
                v,
                levels=config.levels,
                signed=config.signed,
                tau=tau,
                v_threshold=threshold,
                reset=reset,
                backend=self.backend,
                **options,
            )
        spikes = spikes.to(x.dtype)
        self.record(spikes)
        return spikes, v

    def stands_alone(self) -> bool:
        """Whether it must be called and not fused: something hangs on its call, or it is no plain one."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks
        return bool(hooks) or not self.config.plain

    def record_firing(self, x: Tensor, v: Tensor | None, reset: Tensor | None) -> None:
        """Record the firing rate that a call would, if it is monitored: for fused neurons."""
        if self.monitor:
            with torch.no_grad():
                self(x, v, reset)

    def extra_repr(self) -> str:
        """Shown in the model's printout."""
        changed = self.config.model_dump(exclude_defaults=True)
        shown = {"tau": self.config.tau, "v_threshold": self.config.v_threshold, **changed}
        return ", ".join(f"{key}={value}" for key, value in shown.items())


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
