"""Losses of logits whose vocabulary is divided over a tensor group, and not gathered."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def without_padding(logits: Tensor, vocab_size: int, rank: int) -> Tensor:
    """This rank's logits (..., n) with -infinity in place of those of ids from `vocab_size` on."""
    width = logits.shape[-1]
    known = min(max(vocab_size - rank * width, 0), width)
    if known == width:
        return logits
    return F.pad(logits[..., :known], (0, width - known), value=-math.inf)


def vocab_token_losses(logits: Tensor, targets: Tensor, vocab_size: int, group: Any) -> Tensor:
    """Cross-entropy of each token in nats: float32, of targets' shape, the same on all ranks of the group.

    logits (..., n): this rank's part, which may be overwritten; targets (...) int64 ids of the whole
    vocabulary. Padding has no part in the softmax.
    """
    rank = torch.distributed.get_rank(group)
    return _overwriting_losses(without_padding(logits, vocab_size, rank).float(), targets)


def vocab_language_model_loss(
    logits: Tensor, targets: Tensor, regulariser: float, vocab_size: int, group: Any
) -> tuple[Tensor, Tensor]:
    """`language_model_loss` where each rank has the logits (B, T, n) of its part of the vocabulary.

    The logits may be overwritten. Both results are the same on all ranks of the group. The regulariser's
    largest logit is that of the whole vocabulary, and its gradient goes to the rank that has it.
    """
    rank = torch.distributed.get_rank(group)
    logits = without_padding(logits.flatten(0, -2), vocab_size, rank).float()
    # Before the cross-entropy, which leaves no logits behind.
    largest = _LargestOfAll.apply(logits.max(dim=-1).values, group) if regulariser else None
    cross_entropy = _overwriting_losses(logits, targets.flatten()).mean()
    if largest is None:
        return cross_entropy, cross_entropy.detach()
    return cross_entropy + 0.5 * regulariser * largest.square().mean(), cross_entropy.detach()


def _overwriting_losses(logits: Tensor, targets: Tensor) -> Tensor:
    # Computes the softmax in the memory of its logits, over the tensor group of megatron-core's own state.
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits, targets)


class _LargestOfAll(torch.autograd.Function):
    """The largest of the ranks' values, element by element; the first rank that has it gets the gradient."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Any) -> Tensor:
        values = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(values, mine.contiguous(), group=group)
        largest, owner = torch.stack(values).max(dim=0)
        ctx.save_for_backward(owner == torch.distributed.get_rank(group))
        return largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (owned,) = ctx.saved_tensors
        return grad * owned, None
