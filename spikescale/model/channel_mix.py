"""ChannelMix, the gated feed-forward sub-block (SpikeGPT Sec. 3.5, SRFFN)."""

import torch
from torch import Tensor, nn

from spikescale.config.schema import ModelConfig
from spikescale.model.neuron import LIF, NoNeuron
from spikescale.model.state import BlockState, fire, membranes, shift
from spikescale.model.time_mix import LinearFactory, mix

EXPANSION = 4  # inner width over model width


class ChannelMix(nn.Module):
    """x (B, T, C) -> sigmoid(W_r x_r) * W_v g(W_k x_k) with g = relu^2, or a LIF in spikegpt-b.

    State entries: `channel_mix.shift` (B, C); `channel_mix.activation` (B, 4C) in spikegpt-b; in the
    driven variant the membranes in front of each projection: `channel_mix.key`, `channel_mix.receptance`
    (B, C) and `channel_mix.value` (B, 4C), the last reading relu^2.
    """

    def __init__(self, config: ModelConfig, name: str, linear: LinearFactory) -> None:
        super().__init__()
        width, inner = config.width, EXPANSION * config.width
        self.width = width
        self.mu_key = nn.Parameter(torch.empty(width))
        self.mu_receptance = nn.Parameter(torch.empty(width))
        self.key = linear(width, inner, f"{name}.key")
        self.value = linear(inner, width, f"{name}.value")
        self.receptance = linear(width, width, f"{name}.receptance")
        self.squared_relu = config.variant != "spikegpt-b"
        self.widths = {"key": width, "receptance": width, "activation": inner, "value": inner}
        spiking = {"spikegpt-b": ("activation",), "spikegpt-driven": ("key", "receptance", "value")}
        places = spiking.get(config.variant, ())
        self.neurons = nn.ModuleDict(
            {key: LIF(config.neuron, config.backend) if key in places else NoNeuron() for key in self.widths}
        )

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        """The state of `batch` sequences before their first token."""
        neurons = ((f"channel_mix.{key}", self.neurons[key], width) for key, width in self.widths.items())
        return {
            "channel_mix.shift": torch.zeros(batch, self.width, device=device, dtype=dtype),
            **membranes(neurons, batch, device, dtype),
        }

    def forward(self, x: Tensor, state: BlockState, reset: Tensor | None) -> tuple[Tensor, BlockState]:
        """The sub-block's output (B, T, C) and its new state entries."""
        previous, last = shift(x, state["channel_mix.shift"], reset)
        new_state = {"channel_mix.shift": last}

        def drive(key: str, values: Tensor) -> Tensor:
            out, entry = fire(self.neurons[key], f"channel_mix.{key}", values, state, reset)
            new_state.update(entry)
            return out

        k = self.key(drive("key", mix(x, previous, self.mu_key)))
        g = torch.relu(k).square() if self.squared_relu else drive("activation", k)
        r = self.receptance(drive("receptance", mix(x, previous, self.mu_receptance)))
        return torch.sigmoid(r) * self.value(drive("value", g)), new_state
