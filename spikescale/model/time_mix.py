"""TimeMix, the spiking RWKV sub-block that mixes tokens over time (SpikeGPT Sec. 3.4, SRWKV)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spikescale.config.schema import ModelConfig
from spikescale.kernels.wkv import initial_state, wkv
from spikescale.model.neuron import LIF, NoNeuron
from spikescale.model.state import BlockState, fire, membranes, shift

LinearFactory = Callable[[int, int, str], nn.Module]

PROJECTIONS = ("key", "value", "receptance", "output")


def mix(x: Tensor, previous: Tensor, mu: Tensor) -> Tensor:
    """mu x + (1 - mu) previous, the token shift's learnt mixture; mu (C,), in float32 under autocast."""
    return torch.lerp(previous, x, mu)


class TimeMix(nn.Module):
    """x (B, T, C) -> W_o (sigmoid(r) * wkv(k, v)), with k, v, r projected from shifted mixtures of x.

    State entries: `time_mix.shift` (B, C), `time_mix.wkv` (B, 3, C), and in the driven variant the
    membrane `time_mix.<projection>` (B, C) in front of each projection.
    """

    def __init__(self, config: ModelConfig, name: str, linear: LinearFactory) -> None:
        super().__init__()
        width = config.width
        self.width, self.backend = width, config.backend
        self.mu_key = nn.Parameter(torch.empty(width))
        self.mu_value = nn.Parameter(torch.empty(width))
        self.mu_receptance = nn.Parameter(torch.empty(width))
        self.time_decay = nn.Parameter(torch.empty(width))
        self.time_first = nn.Parameter(torch.empty(width))
        self.key = linear(width, width, f"{name}.key")
        self.value = linear(width, width, f"{name}.value")
        self.receptance = linear(width, width, f"{name}.receptance")
        self.output = linear(width, width, f"{name}.output")
        driven = config.variant == "spikegpt-driven"
        self.neurons = nn.ModuleDict(
            {key: LIF(config.neuron, config.backend) if driven else NoNeuron() for key in PROJECTIONS}
        )

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        """The state of `batch` sequences before their first token."""
        neurons = ((f"time_mix.{key}", self.neurons[key], self.width) for key in PROJECTIONS)
        return {
            "time_mix.shift": torch.zeros(batch, self.width, device=device, dtype=dtype),
            "time_mix.wkv": initial_state(batch, self.width, device, dtype),
            **membranes(neurons, batch, device, dtype),
        }

    def forward(self, x: Tensor, state: BlockState, reset: Tensor | None) -> tuple[Tensor, BlockState]:
        """The sub-block's output (B, T, C) and its new state entries."""
        previous, last = shift(x, state["time_mix.shift"], reset)
        new_state = {"time_mix.shift": last}

        def drive(key: str, values: Tensor) -> Tensor:
            out, entry = fire(self.neurons[key], f"time_mix.{key}", values, state, reset)
            new_state.update(entry)
            return out

        k = self.key(drive("key", mix(x, previous, self.mu_key)))
        v = self.value(drive("value", mix(x, previous, self.mu_value)))
        r = self.receptance(drive("receptance", mix(x, previous, self.mu_receptance)))
        w = -torch.exp(self.time_decay)
        y, new_state["time_mix.wkv"] = wkv(
            w, self.time_first, k, v, state["time_mix.wkv"], reset, self.backend
        )
        return self.output(drive("output", torch.sigmoid(r) * y)), new_state
