"""SpikeGPT (Zhu et al. 2023): a causal language model whose blocks speak in spikes."""

from collections.abc import Callable
from typing import cast

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikescale.config.schema import ModelConfig
from spikescale.errors import UserError
from spikescale.model.block import Block, LayerNorm
from spikescale.model.embedding import Embedding
from spikescale.model.init import initialise
from spikescale.model.neuron import LIF, Neuron, NoNeuron
from spikescale.model.state import BlockState, State, fire, membranes
from spikescale.model.time_mix import LinearFactory

# Recording a firing rate is a side effect that backward need not repeat. Unless told so, torch.compile
# refuses checkpointed blocks whose neurons are monitored.
if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def plain_linear(in_features: int, out_features: int, name: str) -> nn.Module:
    """The default projection: bias-free and whole. `name` is the parameter's, without `.weight`."""
    return nn.Linear(in_features, out_features, bias=False)


class SpikeGPT(nn.Module):
    """The five variants of the SpikeGPT family, by `config.variant`.

    Args:
        config: shape and kind; `vocab_size` must be set.
        seed: of the initial weights, which depend on nothing else.
        linear: makes every projection from (in_features, out_features, name); another factory can
            return sharded ones.

    `activation_checkpointing = True` recomputes each block in backward instead of keeping its
    activations. Raises UserError when `config.vocab_size` is missing.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, linear: LinearFactory = plain_linear) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise UserError("model.vocab_size is not set: give a number >= 2, or the data's tokenizer")
        self.config = config
        self.activation_checkpointing = False
        self.embedding = Embedding(config.vocab_size, config.width, config.binary_embedding, config.neuron)
        self.blocks = nn.ModuleList(Block(config, index, linear) for index in range(config.layers))
        self.ln_out = LayerNorm(config.width)
        driven = config.variant == "spikegpt-driven"
        self.head_neuron = LIF(config.neuron, config.backend) if driven else NoNeuron()
        self.head = linear(config.width, config.vocab_size, "head")
        initialise(self, config, seed)

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> State:
        """The state of `batch` sequences before their first token: one dictionary a block.

        Its size does not depend on how much is read. The membrane before the head of the driven variant
        is the entry `head` of the last block.
        """
        weight = self.embedding.weight
        device = torch.device(weight.device if device is None else device)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        state = [cast(Block, block).initial_state(batch, device, dtype) for block in self.blocks]
        state[-1].update(membranes([("head", self.head_neuron, self.config.width)], batch, device, dtype))
        return state

    def forward(
        self, tokens: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits of the next token at every position, and the state after the last one.

        Args:
            tokens: (B, T) int64 below `vocab_size`; not checked here.
            state: what the text before left behind; None: nothing was before.
            reset: (B, T) bool; where true a new document starts, which sees nothing of what was before.

        Returns:
            logits (B, T, V), and a new state; the one passed in is not changed. Gradients flow from one
            call into the one before unless the state is cut by `detach_state`.
        """
        if state is None:
            state = self.initial_state(tokens.shape[0], tokens.device)
        x = self.embedding(tokens)
        new_state: State = []
        for block, block_state in zip(self.blocks, state, strict=True):
            x, entries = self._run(block, x, block_state, reset)
            new_state.append(entries)
        x, entries = fire(self.head_neuron, "head", self.ln_out(x), state[-1], reset)
        new_state[-1].update(entries)
        return self.head(x), new_state

    def _run(
        self, block: nn.Module, x: Tensor, state: BlockState, reset: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        run: Callable[..., tuple[Tensor, BlockState]] = block
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Non-reentrant: works with a state that needs gradients, keeps the dropout's random numbers.
            return checkpoint(run, x, state, reset, use_reentrant=False)
        return run(x, state, reset)

    def neurons(self) -> list[tuple[str, Neuron]]:
        """Every neuron that fires, with its name in the model, in the order of computation within a block."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Neuron)]

    def count_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters; without `embeddings`, the table of input embeddings is left out."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total if embeddings else total - self.embedding.weight.numel()
