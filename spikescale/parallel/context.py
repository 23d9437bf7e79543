"""Context parallelism: successive parts of long sequences on successive ranks.

Each of the P ranks of a context group holds the whole model and reads T / P tokens of every sequence. A block
needs of the tokens before only its state, which has constant size, so what passes between neighbours is one
message a block and direction:

    rank 0    block 0  block 1  block 2  ...              the state after block l goes to the next rank,
    rank 1             block 0  block 1  block 2  ...     in backward its gradient comes back

Waiting has no cycles. In forward, what a rank waits for was handed on before the rank before it began its
next block; in backward, before the rank after it began its next one; and what a rank sends needs no answer
for it to go on. For that, between the first `receive` of a forward pass and the end of its backward, a rank
may join in nothing that needs the others of its group. So gradients are averaged over ranks after backward
(ZeRO 0 and 1), not in its midst whenever a bucket is full (ZeRO 2, which moreover takes for granted that
gradients come in the same order on all ranks: the first and the last one of a group have other graphs than
those between), and weights are whole (not ZeRO 3).
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikescale.model.state import BlockState
from spikescale.parallel.layout import Layout

IN_FLIGHT = 64  # messages that may be on their way before the oldest is waited for


def part_of(tokens: Tensor, layout: Layout) -> Tensor:
    """This rank's part (B, T / P + 1) of samples (B, T + 1): its inputs are [:-1], its targets [1:]."""
    length = (tokens.shape[1] - 1) // layout.context
    first = layout.context_rank * length
    return tokens[:, first : first + length + 1]


class ContextRelay:
    """A `spikescale.model.state.Relay` between the processes of one context group.

    All ranks of the group make the same forward passes in the same order, each followed by its backward if
    gradients are on; no pass may be left out by one rank alone. In backward every parameter must take part,
    as in `loss.backward()`.

    Args:
        ranks: of the group, by their global numbers, in the order of the sequence.
        rank: this process's.
        group: of `ranks`; None: the default one.
    """

    def __init__(self, ranks: Sequence[int], rank: int, group: dist.ProcessGroup | None = None) -> None:
        place = ranks.index(rank)
        self.before = ranks[place - 1] if place else None
        self.after = ranks[place + 1] if place + 1 < len(ranks) else None
        self._group = group
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    @classmethod
    def of(cls, layout: Layout) -> "ContextRelay | None":
        """This rank's relay; None where sequences are not divided. Every rank of the world calls it."""
        if layout.context == 1:
            return None
        groups = {tuple(ranks): dist.new_group(ranks) for ranks in layout.context_groups()}
        (mine,) = (ranks for ranks in groups if layout.rank in ranks)
        return cls(mine, layout.rank, groups[mine])

    def receive(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """x, and the state (shapes and dtypes as in `state`) that the rank before handed on."""
        if torch.is_grad_enabled() and not x.requires_grad:
            # Both neighbours must come by here in backward, even where nothing below is trained.
            x = x.detach().requires_grad_()
        if self.before is None:
            return x, state
        # By name: a block fills its new state in another order than the initial one.
        keys = sorted(state)
        x, *entries = _Receive.apply(x, self, *(state[key] for key in keys))
        return x, dict(zip(keys, entries, strict=True))

    def hand_on(self, x: Tensor, state: BlockState) -> Tensor:
        """x; `state` is sent to the rank after."""
        if self.after is None:
            return x
        handed: Tensor = _HandOn.apply(x, self, *(state[key] for key in sorted(state)))
        return handed

    def finish(self) -> None:
        """Wait until everything that was sent has been taken."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _send(self, tensors: Sequence[Tensor], to: int) -> None:
        dtype = message_dtype(tensors)
        message = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
        if len(self._sent) == IN_FLIGHT:
            self._sent.popleft()[0].wait()
        work = dist.isend(message, to, group=self._group)
        assert work is not None, f"rank {to} is not in this group"
        # The message must outlive its sending.
        self._sent.append((work, message))

    def _take(self, like: Sequence[Tensor], device: torch.device, source: int) -> list[Tensor]:
        sizes = [tensor.numel() for tensor in like]
        message = torch.empty(sum(sizes), dtype=message_dtype(like), device=device)
        dist.recv(message, source, group=self._group)
        parts = zip(message.split(sizes), like, strict=True)
        # Copies, because autograd treats views of one tensor as one.
        return [part.view(tensor.shape).to(tensor.dtype, copy=True) for part, tensor in parts]


def message_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if one of the tensors is, else float32, whatever narrower dtypes they have."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class _Receive(torch.autograd.Function):
    """Forward takes the state from the rank before; backward sends its gradient there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, relay: ContextRelay, *like: Tensor) -> tuple[Tensor, ...]:
        assert relay.before is not None
        ctx.relay = relay
        return x, *relay._take(like, x.device, relay.before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        relay = ctx.relay
        relay._send(gradients, relay.before)
        return grad_x, None, *(None for _ in gradients)


class _HandOn(torch.autograd.Function):
    """Forward sends the state to the rank after; backward takes its gradient from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, relay: ContextRelay, *entries: Tensor) -> Tensor:
        assert relay.after is not None
        ctx.relay = relay
        # Shapes and dtypes, without keeping the values.
        ctx.like = [torch.empty_like(entry, device="meta") for entry in entries]
        relay._send(entries, relay.after)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        relay = ctx.relay
        return grad_x, None, *relay._take(ctx.like, grad_x.device, relay.after)
