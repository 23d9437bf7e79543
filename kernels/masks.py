"""Masks as kernels read them, in C++ and in Triton."""

import torch
from torch import Tensor


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as contiguous bytes."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
