"""Spikes as bits, for tensors that are kept for backward: `pack_spikes`, `unpack_spikes`."""

import torch
from torch import Tensor

from spikescale.kernels.backend import choose_backend
from spikescale.kernels.spike_bits.reference import pack_spikes_reference, unpack_spikes_reference

__all__ = ["pack_spikes", "unpack_spikes"]


def pack_spikes(spikes: Tensor, backend: str = "auto") -> Tensor | None:
    """The spikes as bits: uint8 (ceil(n / 8),), flattened element i in bit i mod 8 of byte i div 8.

    Args:
        spikes: any shape, any floating dtype.
        backend: see `spikescale.kernels.backend`; GPUs use the reference, a handful of torch operations.

    Returns:
        None where an element is neither 0 nor 1, so that nothing is ever lost.
    """
    chosen = choose_backend("spike_bits", backend, spikes.device.type, spikes.dtype)
    if chosen in ("reference", "triton"):
        return pack_spikes_reference(spikes)
    from spikescale.kernels.spike_bits.cpu import pack_spikes_cpu

    return pack_spikes_cpu(spikes, chosen)


def unpack_spikes(bits: Tensor, shape: torch.Size, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """What `pack_spikes` was given: a contiguous tensor of `shape` and `dtype`."""
    chosen = choose_backend("spike_bits", backend, bits.device.type, dtype)
    if chosen in ("reference", "triton"):
        return unpack_spikes_reference(bits, shape, dtype)
    from spikescale.kernels.spike_bits.cpu import unpack_spikes_cpu

    return unpack_spikes_cpu(bits, shape, dtype, chosen)
