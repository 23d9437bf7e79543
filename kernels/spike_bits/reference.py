"""Spikes as bits, the definition."""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_spikes_reference(spikes: Tensor) -> Tensor | None:
    """Shapes and meaning as for `pack_spikes`."""
    flat = spikes.detach().flatten()
    ones = flat == 1
    if not bool((ones | (flat == 0)).all()):
        return None
    eights = F.pad(ones, (0, -flat.numel() % 8)).view(-1, 8)
    return (eights << torch.arange(8, device=flat.device)).sum(1).to(torch.uint8)


def unpack_spikes_reference(bits: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Shapes and meaning as for `unpack_spikes`."""
    eights = (bits.unsqueeze(1) >> torch.arange(8, device=bits.device, dtype=torch.uint8)) & 1
    return eights.flatten()[: shape.numel()].view(shape).to(dtype)
