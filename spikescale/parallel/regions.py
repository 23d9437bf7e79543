"""Where tensors pass between whole and divided computation, with the communication of their gradients.

Two autograd functions of our own stand in for megatron-core's. Its gather allocates on a CUDA device
whatever the tensors are on. Its copy into the region sums the gradient of each tensor by itself, in place
(another consumer may hold the same tensor), and loses the sum of a gradient that is not contiguous.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def enter(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors unchanged; backward sums their gradients over the group. Vectors travel together."""
    return _Enter.apply(group, *tensors)


def gather(x: Tensor, group: Any) -> Tensor:
    """x (..., C) of all ranks of the group side by side, (..., size C); backward takes this rank's part."""
    return _Gather.apply(x, group)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sums: list[Tensor | None] = [None] * len(grads)
        vectors = []
        for index, grad in enumerate(grads):
            if not ctx.needs_input_grad[index + 1]:
                continue
            if grad.dim() == 1:
                vectors.append(index)
                continue
            total = grad.clone(memory_format=torch.contiguous_format)
            torch.distributed.all_reduce(total, group=ctx.group)
            sums[index] = total
        if vectors:
            together = torch.cat([grads[index] for index in vectors])
            torch.distributed.all_reduce(together, group=ctx.group)
            parts = together.split([len(grads[index]) for index in vectors])
            for index, total in zip(vectors, parts, strict=True):
                sums[index] = total
        return None, *sums


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, x, group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        first = torch.distributed.get_rank(ctx.group) * ctx.width
        return grad.narrow(-1, first, ctx.width).contiguous(), None
