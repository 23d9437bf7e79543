"""ChannelMix, the gated feed-forward sub-block (SpikeGPT Sec. 3.5, SRFFN)."""

import torch
from torch import Tensor, nn

from spikescale.config.schema import ModelConfig
from spikescale.kernels.activations import sigmoid_gate, squared_relu
from spikescale.kernels.token_mix import token_mix
from spikescale.model.neuron import LIF, NoNeuron
from spikescale.model.parts import Parts
from spikescale.model.recompute import project
from spikescale.model.state import BlockState, fire, membranes
from spikescale.model.time_mix import projection_dtype

EXPANSION = 4  # inner width over model width


class ChannelMix(nn.Module):
    """x (B, T, C) -> sigmoid(W_r x_r) * W_v g(W_k x_k) with g = relu^2, or a LIF in spikegpt-b.

    State entries: `channel_mix.shift` (B, C); `channel_mix.activation` (B, 4C) in spikegpt-b; in the
    driven variant the membranes in front of each projection: `channel_mix.key`, `channel_mix.receptance`
    (B, C) and `channel_mix.value` (B, 4C), the last reading relu^2. Where the model is divided, the inner
    4C channels are those of this part.
    """

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        width, inner = config.width, EXPANSION * config.width
        self.width, self.backend, self.parts = width, config.backend, parts
        self.pack_spikes = True
        self.mu_key = nn.Parameter(torch.empty(width))
        self.mu_receptance = nn.Parameter(torch.empty(width))
        self.key = parts.column(width, inner)
        self.value = parts.row(inner, width)
        self.receptance = parts.column(width, width)
        self.squared_relu = config.variant != "spikegpt-b"
        local = parts.channels(inner)
        self.widths = {"key": width, "receptance": width, "activation": local, "value": local}
        spiking = {"spikegpt-b": ("activation",), "spikegpt-driven": ("key", "receptance", "value")}
        places = spiking.get(config.variant, ())
        self.neurons = nn.ModuleDict(
            {
                key: LIF(config.neuron, here, config.backend) if key in places else NoNeuron()
                for key, here in self.widths.items()
            }
        )
        self.binary = config.neuron.bits == 1 and not config.neuron.signed

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        """The state of `batch` sequences before their first token."""
        neurons = ((f"channel_mix.{key}", self.neurons[key], width) for key, width in self.widths.items())
        return {
            "channel_mix.shift": torch.zeros(batch, self.width, device=device, dtype=dtype),
            **membranes(neurons, batch, device, dtype),
        }

    def forward(self, x: Tensor, state: BlockState, reset: Tensor | None) -> tuple[Tensor, BlockState]:
        """The sub-block's output (B, T, C) and its new state entries."""
        x, *mus = self.parts.enter(x, self.mu_key, self.mu_receptance)
        new_state = {"channel_mix.shift": x[:, -1]}
        driven = isinstance(self.neurons["key"], LIF)

        def drive(key: str, values: Tensor) -> Tensor:
            out, entry = fire(self.neurons[key], f"channel_mix.{key}", values, state, reset)
            new_state.update(entry)
            return out

        def driven_by(key: str, values: Tensor, spikes: bool) -> Tensor:
            packed = spikes and self.binary and self.pack_spikes
            return project(getattr(self, key), drive(key, values), packed)

        # Neurons read their currents in float32.
        dtype = None if driven else projection_dtype(x)
        mixed = token_mix(x, mus, state["channel_mix.shift"], reset, dtype, self.backend)
        k = driven_by("key", mixed[0], driven)
        g = squared_relu(k, self.backend) if self.squared_relu else drive("activation", k)
        # Whole, because it gates the sum of all parts' values.
        r = self.parts.gather(driven_by("receptance", mixed[1], driven))
        value = driven_by("value", g, driven or not self.squared_relu)
        return sigmoid_gate(r, value, self.backend), new_state
