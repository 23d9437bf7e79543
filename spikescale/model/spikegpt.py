"""SpikeGPT (Zhu et al. 2023): a causal language model whose blocks speak in spikes."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from spikescale.config.schema import ModelConfig
from spikescale.errors import UserError
from spikescale.model.block import Block
from spikescale.model.channel_mix import ChannelMix
from spikescale.model.init import initialise
from spikescale.model.neuron import LIF, Neuron, NoNeuron
from spikescale.model.norm import LayerNorm
from spikescale.model.parts import Parts
from spikescale.model.recompute import SpikeCounts, recomputed
from spikescale.model.state import Relay, State, detach_state, fire, membranes
from spikescale.model.time_mix import TimeMix


class SpikeGPT(nn.Module):
    """The five variants of the SpikeGPT family, by `config.variant`.

    Args:
        config: shape and kind; `vocab_size` must be set.
        seed: of the initial weights, which depend on nothing else.
        parts: makes what can be divided over processes; None: the whole model is here.

    `activation_checkpointing = True` recomputes each block in backward instead of keeping its
    activations. `compact_activations` (on) keeps what spikes allow in less memory, bit for bit the same:
    inputs of recomputed blocks as uint8 counts of spikes, spikes that projections read as bits.
    Raises UserError when `config.vocab_size` is missing.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, parts: Parts | None = None) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise UserError("model.vocab_size is not set: give a number >= 2, or the data's tokenizer")
        self.config = config
        self._activation_checkpointing = False
        self.parts = parts = Parts() if parts is None else parts
        self.embedding = parts.embedding(
            config.vocab_size, config.width, config.binary_embedding, config.neuron
        )
        self.blocks = nn.ModuleList(Block(config, index, parts) for index in range(config.layers))
        self.ln_out = LayerNorm(config.width, config.backend)
        driven = config.variant == "spikegpt-driven"
        self.head_neuron = LIF(config.neuron, config.width, config.backend) if driven else NoNeuron()
        self.head = parts.head(config.width, config.vocab_size)
        self.compact_activations = True
        initialise(self, config, seed, parts)

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> State:
        """The state of `batch` sequences before their first token: one dictionary a block.

        Its size does not depend on how much is read. The membrane before the head of the driven variant
        is the entry `head` of the last block.
        """
        weight = cast(Tensor, self.embedding.weight)
        device = torch.device(weight.device if device is None else device)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        state = [cast(Block, block).initial_state(batch, device, dtype) for block in self.blocks]
        state[-1].update(membranes([("head", self.head_neuron, self.config.width)], batch, device, dtype))
        return state

    @property
    def activation_checkpointing(self) -> bool:
        """Whether blocks are recomputed in backward."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, wanted: bool) -> None:
        self._activation_checkpointing = wanted
        if wanted:
            # Not at the top: importing it takes seconds, and nobody else needs it.
            import torch._dynamo

            # Recording a firing rate is a side effect that backward need not repeat. Unless told so,
            # torch.compile refuses checkpointed blocks whose neurons are monitored.
            if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
                torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        targets: Tensor | None = None,
        regulariser: float = 0.0,
        relay: Relay | None = None,
    ) -> tuple[Tensor, State]:
        """Logits of the next token at every position, and the state after the last one.

        Args:
            tokens: (B, T) int64 below `vocab_size`; not checked here.
            state: what the text before left behind; None: nothing was before.
            reset: (B, T) bool; where true a new document starts, which sees nothing of what was before.
            targets: (B, T) int64, the next tokens; if given, logits are never held for all tokens at once
                and losses take their place (`fused_loss`: GPUs, a plain head).
            regulariser: of the logits, for that loss.
            relay: takes every block's state from whoever reads the part of the sequences before these tokens,
                in place of `state`, and hands it on to the part after.

        Returns:
            logits (B, T, V), where `parts` divides the vocabulary those of the part here; with `targets` a
            tensor (2,) of the loss to minimise and the cross-entropy to report in nats a token; and a new
            state; the one passed in is not changed. Gradients flow from one call into the one before unless
            the state is cut by `detach_state`; with a relay it is cut here, because its gradient is the
            relay's to fetch.
        """
        if state is None:
            state = self.initial_state(tokens.shape[0], tokens.device)
        blocks = [cast(Block, block) for block in self.blocks]
        x = blocks[0].enter(self.embedding(tokens))
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        exact = blocks[0].adds_spikes and not (self.training and self.config.dropout)
        counts = SpikeCounts(x) if recompute and exact and self.compact_activations else None
        norms = [*(block.ln1 for block in blocks[1:]), self.ln_out]
        normed: Tensor | None = None
        new_state: State = []
        for index, (block, norm, block_state) in enumerate(zip(blocks, norms, state, strict=True)):
            if relay is not None:
                x, block_state = relay.receive(x, block_state)
            if recompute:
                # Kept and recomputed block by block, so that only the stream lies between them.
                x, _, entries = recomputed(counts, block, x, None, block_state, reset, None)
            else:
                x, normed, entries = block(x, normed, block_state, reset, norm)
            if index == len(blocks) - 1:
                (x,) = self.parts.enter(self.ln_out(x) if normed is None else normed)
                x, head_entry = fire(self.head_neuron, "head", x, block_state, reset)
                entries.update(head_entry)
            if relay is not None:
                x = relay.hand_on(x, entries)
            new_state.append(entries)
        if relay is not None:
            new_state = detach_state(new_state)
        if targets is None:
            return self.head(x), new_state
        from spikescale.model.fused_loss import fused_language_model_loss

        weight = cast(Tensor, self.head.weight)
        return torch.stack(fused_language_model_loss(x, weight, targets, regulariser)), new_state

    @property
    def compact_activations(self) -> bool:
        """Whether activations are kept in as little memory as spikes allow."""
        return self._compact_activations

    @compact_activations.setter
    def compact_activations(self, on: bool) -> None:
        self._compact_activations = on
        for module in self.modules():
            if isinstance(module, TimeMix | ChannelMix):
                module.pack_spikes = on

    def neurons(self) -> list[tuple[str, Neuron]]:
        """Every neuron that fires, with its name in the model, in the order of computation within a block."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Neuron)]

    def count_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters of the whole model; without `embeddings`, less the input embeddings' table."""
        shapes = {name: self.parts.full_shape(parameter) for name, parameter in self.named_parameters()}
        return sum(
            math.prod(shape) for name, shape in shapes.items() if embeddings or name != "embedding.weight"
        )
