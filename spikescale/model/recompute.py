"""What backward needs, kept as small as spikes allow: counts of spikes, and spikes as bits.

The residual stream of a spiking model is its start plus the number of spikes added since, and it lies on a
grid on which that sum is exact (`norm.stream_grid`). So the input of a block, kept for its recomputation in
backward, needs one byte an element and not four: the count. It is checked when it is taken; a stream that
is not its start plus small integers (dropout scales it; non-spiking variants add floats) is kept as it is.

A projection that reads spikes keeps them for the gradient of its weights: one bit each, not two bytes or
four.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikescale.kernels.spike_bits import pack_spikes, pack_sure_spikes, unpack_spikes

logger = logging.getLogger("spikescale.model")


class SpikeCounts:
    """Packs streams that started as `start` (B, T, C) into uint8 counts, and back, bit for bit."""

    def __init__(self, start: Tensor) -> None:
        self.start = start.detach()

    def pack(self, x: Tensor) -> Tensor | tuple[Tensor]:
        """The counts of x in a tuple; x itself where it is no stream, or not start + integers up to 255."""
        if x.shape != self.start.shape or x.dtype != self.start.dtype:
            return x
        counts = (x.detach() - self.start).to(torch.uint8)
        if not torch.equal(self.start + counts, x):
            _say_once("the residual stream is not its start plus spikes; checkpoints stay in full precision")
            return x
        return (counts,)

    def unpack(self, packed: Tensor | tuple[Tensor]) -> Tensor:
        """What `pack` was given."""
        return self.start + packed[0] if isinstance(packed, tuple) else packed


def recomputed(counts: SpikeCounts | None, run: Callable[..., Any], *arguments: Any) -> Any:
    """run(*arguments), recomputed in backward instead of keeping what it computes; random numbers repeat.

    With `counts`, arguments that are residual streams are kept as counts of spikes.
    """
    # Non-reentrant: works with states that need gradients.
    if counts is None or torch.compiler.is_compiling():
        return checkpoint(run, *arguments, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(counts.pack, counts.unpack):
        return checkpoint(run, *arguments, use_reentrant=False)


def project(linear: nn.Module, x: Tensor, spikes: bool) -> Tensor:
    """linear(x); where x is `spikes`, they are kept for backward as bits."""
    if not spikes or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return linear(x)
    size = x.numel()

    def pack(tensor: Tensor) -> Tensor | tuple[Tensor, torch.Size, torch.dtype]:
        if tensor.numel() != size or not tensor.is_floating_point():
            return tensor
        # The matrix product may keep its input as a transposed view, and its weight beside it. Where the
        # weight cannot be taken for the input, a GPU need not be waited for to know what this is.
        sure = tensor.is_cuda and all(weight.numel() != size for weight in linear.parameters())
        bits = pack_sure_spikes(tensor) if sure else pack_spikes(tensor)
        return tensor if bits is None else (bits, tensor.shape, tensor.dtype)

    def unpack(packed: Tensor | tuple[Tensor, torch.Size, torch.dtype]) -> Tensor:
        return packed if isinstance(packed, Tensor) else unpack_spikes(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return linear(x)


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.info(message)
