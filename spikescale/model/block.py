"""One block: TimeMix and ChannelMix, each normalised before, fired after and added."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikescale.config.schema import ModelConfig
from spikescale.model.channel_mix import ChannelMix
from spikescale.model.neuron import LIF, Heaviside, NoNeuron
from spikescale.model.norm import Firing, LayerNorm, add_spikes, on_grid
from spikescale.model.parts import Parts
from spikescale.model.state import BlockState, fire, membranes
from spikescale.model.time_mix import TimeMix


def output_neuron(config: ModelConfig) -> nn.Module:
    """The neuron after a sub-block, by variant; in the driven one the neurons sit before projections."""
    if config.variant in ("rwkv", "spikegpt-driven"):
        return NoNeuron()
    if config.variant == "heaviside-rwkv":
        return Heaviside(config.neuron)
    return LIF(config.neuron, config.width, config.backend)


class Block(nn.Module):
    """Pre-norm residual block whose branches add spikes (SEW residual, SpikeGPT Sec. 3.3).

    x = x + LIF1(TimeMix(LN1(x))); x = x + LIF2(ChannelMix(LN2(x))); dropout. Block 0 starts with an extra
    LayerNorm. The residual stream keeps the dtype of the LayerNorms (float32). Where spikes are added to
    it, LN0 leaves it on a grid (`norm.stream_grid`) on which those sums are exact. State entries beside
    those of the sub-blocks: the membranes `time_neuron` and `channel_neuron` (B, C).
    """

    def __init__(self, config: ModelConfig, index: int, parts: Parts) -> None:
        super().__init__()
        self.width, self.dropout, self.layers = config.width, config.dropout, config.layers
        self.backend = config.backend
        self.largest_spike = config.neuron.levels
        self.adds_spikes = config.variant not in ("rwkv", "spikegpt-driven")
        self.ln0 = LayerNorm(config.width, config.backend) if index == 0 else None
        self.ln1 = LayerNorm(config.width, config.backend)
        self.ln2 = LayerNorm(config.width, config.backend)
        self.time_mix = TimeMix(config, parts)
        self.channel_mix = ChannelMix(config, parts)
        self.time_neuron = output_neuron(config)
        self.channel_neuron = output_neuron(config)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        """The state of `batch` sequences before their first token."""
        neurons = (
            ("time_neuron", self.time_neuron, self.width),
            ("channel_neuron", self.channel_neuron, self.width),
        )
        return {
            **self.time_mix.initial_state(batch, device, dtype),
            **self.channel_mix.initial_state(batch, device, dtype),
            **membranes(neurons, batch, device, dtype),
        }

    def enter(self, x: Tensor) -> Tensor:
        """The start of the residual stream, from the embedding: what only block 0 does."""
        if self.ln0 is None:
            return x
        x = self.ln0(x)
        return on_grid(x, self.layers * self.largest_spike) if self.adds_spikes else x

    def forward(
        self,
        x: Tensor,
        normed: Tensor | None,
        state: BlockState,
        reset: Tensor | None,
        next_norm: LayerNorm | None,
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        """The residual stream (B, T, C) after this block, it normalised by `next_norm`, and the new state.

        `normed` is LN1(x) if that has been computed; None: it is computed here. Without `next_norm`,
        the second result is None.
        """
        if normed is None:
            normed = self.ln1(x)
        mixed, new_state = self.time_mix(normed, state, reset)
        x, normed, entry = self._add("time_neuron", x, mixed, state, reset, self.ln2, 0.0)
        new_state.update(entry)
        mixed, entries = self.channel_mix(normed, state, reset)
        new_state.update(entries)
        dropout = self.dropout if self.training else 0.0
        x, normed, entry = self._add("channel_neuron", x, mixed, state, reset, next_norm, dropout)
        new_state.update(entry)
        return x, normed, new_state

    def _add(
        self,
        name: str,
        x: Tensor,
        mixed: Tensor,
        state: BlockState,
        reset: Tensor | None,
        norm: LayerNorm | None,
        dropout: float,
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        """(x + neuron(mixed) after dropout, it normalised, the neuron's new state)."""
        neuron = getattr(self, name)
        if not isinstance(neuron, LIF) or neuron.stands_alone():
            spikes, entry = fire(neuron, name, mixed, state, reset)
            x = x + spikes
            if dropout:
                x = F.dropout(x, dropout)
            return x, None if norm is None else norm(x), entry
        v = state[name]
        neuron.record_firing(mixed, v, reset)
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if dropout else 0
        firing = Firing(mixed, v, reset, neuron.config, dropout, seed)
        if norm is None:
            x, normed, v = add_spikes(x, firing, backend=self.backend)
        else:
            x, normed, v = norm(x, firing)
        return x, normed, {name: v}
