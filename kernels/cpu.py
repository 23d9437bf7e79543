"""Handing tensors to C: what the ctypes bindings of the CPU kernels share."""

import torch
from torch import Tensor


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor's data, or a null pointer."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as contiguous bytes."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
