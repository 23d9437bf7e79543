"""Which part of a parameter a rank of a tensor group holds.

A parameter that is divided carries three attributes:

    tensor_model_parallel   True; DeepSpeed counts such a parameter on every rank of the group in the norm
                            of the gradient, and any other one once
    partition_dim           the dimension that is divided evenly
    full_length             its length in the whole model

Only the vocabulary may not divide evenly: the last parts are then padded with rows of zeros, which no token
and no loss ever touches. Any other parameter is the same on all ranks of the group.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mark_sharded(parameter: Tensor, dim: int, full_length: int) -> None:
    """Say that `parameter` is one even part, along `dim`, of a parameter `full_length` long there."""
    attributes = {"tensor_model_parallel": True, "partition_dim": dim, "full_length": full_length}
    for name, value in attributes.items():
        setattr(parameter, name, value)


def is_sharded(parameter: Tensor) -> bool:
    """Whether other ranks hold other parts of the parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the parameter in the whole model, without padding."""
    shape = list(parameter.shape)
    if is_sharded(parameter):
        shape[parameter.partition_dim] = parameter.full_length
    return tuple(shape)


def local_slice(full: Tensor, parameter: Any, tensor_rank: int, tensor_size: int) -> Tensor:
    """What the `tensor_rank`-th of `tensor_size` ranks holds of `full`, with zeros for padding.

    `full` is anything that goes with the whole parameter element by element: its value, its gradient, a
    moment. For a parameter that is not divided it is returned as it is, else a contiguous copy.
    Raises ValueError for a tensor of another shape, or a parameter not divided into `tensor_size` parts.
    """
    if tuple(full.shape) != full_shape(parameter):
        raise ValueError(f"full must be {full_shape(parameter)}, not {tuple(full.shape)}")
    if not is_sharded(parameter):
        return full
    dim, length = parameter.partition_dim, parameter.shape[parameter.partition_dim]
    if not 0 <= parameter.full_length <= length * tensor_size:
        raise ValueError(f"{tensor_size} parts of {length} do not make {parameter.full_length}")
    start = min(tensor_rank * length, parameter.full_length)
    stop = min(start + length, parameter.full_length)
    part = full.new_zeros(parameter.shape)
    part.narrow(dim, 0, stop - start).copy_(full.narrow(dim, start, stop - start))
    return part


def join(parts: Sequence[Tensor], parameter: Any) -> Tensor:
    """The whole tensor, without padding, from those of all ranks of the group in their order."""
    if not is_sharded(parameter):
        return parts[0]
    whole = torch.cat(list(parts), parameter.partition_dim)
    return whole.narrow(parameter.partition_dim, 0, parameter.full_length)


def full_tensor(local: Tensor, parameter: Any, group: Any) -> Tensor | None:
    """The whole tensor on the first rank of the tensor `group`, None on the others, which take part.

    `local` is this rank's part of something that goes with `parameter` element by element, on the device
    that the group communicates on. Nothing is communicated for a parameter that is not divided. Without a
    group (None), or where nothing is divided, the result is `local` itself.
    """
    if group is None:
        return local
    first, size = torch.distributed.get_rank(group) == 0, torch.distributed.get_world_size(group)
    if not is_sharded(parameter):
        return local if first else None
    if tuple(local.shape) != tuple(parameter.shape):
        raise ValueError(f"local must be {tuple(parameter.shape)}, not {tuple(local.shape)}")
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(size)]
    torch.distributed.gather(local.contiguous(), parts if first else None, group=group, group_dst=0)
    return join(parts, parameter) if first else None
