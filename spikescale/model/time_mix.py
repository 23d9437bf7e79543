"""TimeMix, the spiking RWKV sub-block that mixes tokens over time (SpikeGPT Sec. 3.4, SRWKV)."""

import torch
from torch import Tensor, nn

from spikescale.config.schema import ModelConfig
from spikescale.kernels.token_mix import token_mix
from spikescale.kernels.wkv import initial_state, wkv
from spikescale.model.neuron import LIF, NoNeuron
from spikescale.model.parts import Parts
from spikescale.model.recompute import project
from spikescale.model.state import BlockState, fire, membranes

PROJECTIONS = ("key", "value", "receptance", "output")


def projection_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which projections of x are computed: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class TimeMix(nn.Module):
    """x (B, T, C) -> W_o (sigmoid(r) * wkv(k, v)), with k, v, r projected from shifted mixtures of x.

    State entries: `time_mix.shift` (B, C), `time_mix.wkv` (B, 3, C), and in the driven variant the
    membrane `time_mix.<projection>` (B, C) in front of each projection. Where the model is divided, WKV and
    all between the projections (the membrane `time_mix.output` too) has the channels of this part.
    """

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        width = config.width
        self.width, self.backend, self.parts = width, config.backend, parts
        self.channels = parts.channels(width)
        self.pack_spikes = True
        self.mu_key = nn.Parameter(torch.empty(width))
        self.mu_value = nn.Parameter(torch.empty(width))
        self.mu_receptance = nn.Parameter(torch.empty(width))
        self.time_decay = parts.vector(width)
        self.time_first = parts.vector(width)
        self.key = parts.column(width, width)
        self.value = parts.column(width, width)
        self.receptance = parts.column(width, width)
        self.output = parts.row(width, width)
        driven = config.variant == "spikegpt-driven"
        self.widths = {**dict.fromkeys(PROJECTIONS, width), "output": self.channels}
        self.neurons = nn.ModuleDict(
            {
                key: LIF(config.neuron, here, config.backend) if driven else NoNeuron()
                for key, here in self.widths.items()
            }
        )
        self.binary = config.neuron.bits == 1 and not config.neuron.signed

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        """The state of `batch` sequences before their first token."""
        neurons = ((f"time_mix.{key}", self.neurons[key], width) for key, width in self.widths.items())
        return {
            "time_mix.shift": torch.zeros(batch, self.width, device=device, dtype=dtype),
            "time_mix.wkv": initial_state(batch, self.channels, device, dtype),
            **membranes(neurons, batch, device, dtype),
        }

    def forward(self, x: Tensor, state: BlockState, reset: Tensor | None) -> tuple[Tensor, BlockState]:
        """The sub-block's output (B, T, C) and its new state entries."""
        x, *mus = self.parts.enter(x, self.mu_key, self.mu_value, self.mu_receptance)
        new_state = {"time_mix.shift": x[:, -1]}
        driven = isinstance(self.neurons["key"], LIF)

        def driven_by(key: str, values: Tensor) -> Tensor:
            out, entry = fire(self.neurons[key], f"time_mix.{key}", values, state, reset)
            new_state.update(entry)
            return project(getattr(self, key), out, driven and self.binary and self.pack_spikes)

        # Neurons read their currents in float32.
        dtype = None if driven else projection_dtype(x)
        mixed = token_mix(x, mus, state["time_mix.shift"], reset, dtype, self.backend)
        k = driven_by("key", mixed[0])
        v = driven_by("value", mixed[1])
        r = driven_by("receptance", mixed[2])
        y, new_state["time_mix.wkv"] = wkv(
            -torch.exp(self.time_decay),
            self.time_first,
            k,
            v,
            state["time_mix.wkv"],
            reset,
            r,
            self.backend,
        )
        return driven_by("output", y), new_state
