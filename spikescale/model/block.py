"""One block: TimeMix and ChannelMix, each normalised before, fired after and added."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikescale.config.schema import ModelConfig
from spikescale.model.channel_mix import ChannelMix
from spikescale.model.neuron import LIF, Heaviside, NoNeuron
from spikescale.model.state import BlockState, fire, membranes
from spikescale.model.time_mix import LinearFactory, TimeMix


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed and returned in its weights' dtype, whatever autocast does."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised over the last dimension."""
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(
                x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps
            )


def output_neuron(config: ModelConfig) -> nn.Module:
    """The neuron after a sub-block, by variant; in the driven one the neurons sit before projections."""
    if config.variant in ("rwkv", "spikegpt-driven"):
        return NoNeuron()
    if config.variant == "heaviside-rwkv":
        return Heaviside(config.neuron)
    return LIF(config.neuron, config.backend)


class Block(nn.Module):
    """Pre-norm residual block whose branches add spikes (SEW residual, SpikeGPT Sec. 3.3).

    x = x + LIF1(TimeMix(LN1(x))); x = x + LIF2(ChannelMix(LN2(x))); dropout. Block 0 starts with an extra
    LayerNorm. The residual stream keeps the dtype of the LayerNorms (float32): spikes are added to it
    exactly, and sums of thousands of them stay exact. State entries beside those of the sub-blocks: the
    membranes `time_neuron` and `channel_neuron` (B, C).
    """

    def __init__(self, config: ModelConfig, index: int, linear: LinearFactory) -> None:
        super().__init__()
        self.width, self.dropout = config.width, config.dropout
        self.ln0 = LayerNorm(config.width) if index == 0 else None
        self.ln1 = LayerNorm(config.width)
        self.ln2 = LayerNorm(config.width)
        self.time_mix = TimeMix(config, f"blocks.{index}.time_mix", linear)
        self.channel_mix = ChannelMix(config, f"blocks.{index}.channel_mix", linear)
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

    def forward(self, x: Tensor, state: BlockState, reset: Tensor | None) -> tuple[Tensor, BlockState]:
        """The residual stream (B, T, C) after this block, and the block's new state."""
        if self.ln0 is not None:
            x = self.ln0(x)
        new_state: BlockState = {}
        mixed, entries = self.time_mix(self.ln1(x), state, reset)
        new_state.update(entries)
        spikes, entries = fire(self.time_neuron, "time_neuron", mixed, state, reset)
        new_state.update(entries)
        x = x + spikes
        mixed, entries = self.channel_mix(self.ln2(x), state, reset)
        new_state.update(entries)
        spikes, entries = fire(self.channel_neuron, "channel_neuron", mixed, state, reset)
        new_state.update(entries)
        x = x + spikes
        return F.dropout(x, self.dropout, self.training), new_state
