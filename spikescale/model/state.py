"""The recurrent state of a model: what a prefix of the text leaves behind, of constant size.

One flat dictionary of tensors a block. Dictionaries and not classes, so that a state can be moved,
saved, indexed by batch row and handed between processes with plain torch.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

BlockState = dict[str, Tensor]
State = list[BlockState]


class Relay(Protocol):
    """Hands states between models that read successive parts of the same sequences.

    The model calls `receive` before each block and `hand_on` after it, outside of what activation
    checkpointing repeats. Both also take the residual stream, or what the head reads, and return it with
    the same values: so the two lie on the way from the loss to every parameter, and backward passes
    `hand_on`, the block and `receive` in this order.
    """

    def receive(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """x, and the block's state after the part before; `state` itself where there is none before."""
        ...

    def hand_on(self, x: Tensor, state: BlockState) -> Tensor:
        """x; the block's state is on its way to whoever reads the part after."""
        ...


def fire(
    neuron: nn.Module, key: str, x: Tensor, state: BlockState, reset: Tensor | None
) -> tuple[Tensor, BlockState]:
    """Call `neuron` on x with its membrane `state[key]`; its output, and the entries that replace it."""
    out, v = neuron(x, state.get(key), reset)
    return out, ({key: v} if neuron.stateful else {})


def detach_state(state: State) -> State:
    """The same state cut from the graph that computed it: for training over successive chunks."""
    return [{key: tensor.detach() for key, tensor in block.items()} for block in state]


def membranes(
    neurons: Iterable[tuple[str, nn.Module, int]], batch: int, device: torch.device, dtype: torch.dtype
) -> BlockState:
    """Zero membranes (batch, width) for those of the (key, neuron, width) that have one."""
    return {
        key: torch.zeros(batch, width, device=device, dtype=dtype)
        for key, neuron, width in neurons
        if neuron.stateful
    }
