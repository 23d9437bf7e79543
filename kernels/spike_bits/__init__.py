"""Spikes as bits, for tensors that are kept for backward: `pack_spikes`, `unpack_spikes`."""

import torch
from torch import Tensor

from spikescale.kernels.backend import choose_backend
from spikescale.kernels.spike_bits.reference import pack_spikes_reference, unpack_spikes_reference

__all__ = ["pack_spikes", "pack_sure_spikes", "unpack_spikes"]


def pack_spikes(spikes: Tensor, backend: str = "auto") -> Tensor | None:
    """The spikes as bits: uint8 (ceil(n / 8),), flattened element i in bit i mod 8 of byte i div 8.

    Args:
        spikes: any shape, any floating dtype.
        backend: see `spikescale.kernels.backend`.

    Returns:
        None where an element is neither 0 nor 1, so that nothing is ever lost. To know it, the CPU waits for
        the GPU that holds the tensor.

    Raises:
        UserError: the backend is unknown, or cannot serve the tensor.
    """
    chosen = choose_backend("spike_bits", backend, spikes.device.type, spikes.dtype)
    if chosen == "reference":
        return pack_spikes_reference(spikes)
    if chosen == "triton":
        from spikescale.kernels.spike_bits.triton import pack_spikes_triton

        return pack_spikes_triton(spikes)
    from spikescale.kernels.spike_bits.cpu import pack_spikes_cpu

    return pack_spikes_cpu(spikes, chosen)


def pack_sure_spikes(spikes: Tensor, backend: str = "auto") -> Tensor | None:
    """`pack_spikes` of a tensor that is known to hold spikes: a GPU is not waited for.

    What the caller is sure of is still checked, but where the answer is not at hand it is kept with the bits
    and not returned: if an element is neither 0 nor 1 (the NaN of a diverged membrane), `unpack_spikes` gives
    NaN for it and for the some thousands of elements beside it. Nothing else ever comes of it.
    """
    chosen = choose_backend("spike_bits", backend, spikes.device.type, spikes.dtype)
    if chosen != "triton":
        return pack_spikes(spikes, chosen)
    from spikescale.kernels.spike_bits.triton import pack_spikes_triton

    return pack_spikes_triton(spikes, sure=True)


def unpack_spikes(bits: Tensor, shape: torch.Size, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """What `pack_spikes` or `pack_sure_spikes` was given: a contiguous tensor of `shape` and `dtype`.

    `backend` must be the one that packed. Raises UserError as `pack_spikes` does.
    """
    chosen = choose_backend("spike_bits", backend, bits.device.type, dtype)
    if chosen == "reference":
        return unpack_spikes_reference(bits, shape, dtype)
    if chosen == "triton":
        from spikescale.kernels.spike_bits.triton import unpack_spikes_triton

        return unpack_spikes_triton(bits, shape, dtype)
    from spikescale.kernels.spike_bits.cpu import unpack_spikes_cpu

    return unpack_spikes_cpu(bits, shape, dtype, chosen)
