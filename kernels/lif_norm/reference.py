"""Neurons, residual sum, dropout and LayerNorm, the definition."""

import torch
from torch import Tensor
from torch.nn import functional as F

from spikescale.kernels.lif.reference import lif_reference


def dropout_keep(shape: torch.Size, dropout: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Which elements of a tensor of `shape` dropout keeps: bool, true with probability 1 - dropout.

    Element i (row-major) is kept when an integer hash of (seed, i) is at least dropout * 2^32. All
    arithmetic is on unsigned 32-bit integers, wrapping: i and the seed enter as their low and high halves.
    """
    index = torch.arange(shape.numel(), device=device, dtype=torch.int64)
    low, high = index & _MASK, index >> 32
    bits = _mixed(low ^ _mixed_int(seed & _MASK))
    bits = _mixed(bits ^ high ^ _mixed_int((seed >> 32) ^ 0x9E3779B9))
    return (bits >= int(dropout * 2**32)).view(shape)


def lif_residual_norm_reference(
    x: Tensor,
    current: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tau: float | Tensor,
    v_threshold: float | Tensor,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    dropout: float,
    seed: int,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Shapes and meaning as for `lif_residual_norm`; computed in x's dtype."""
    neuron = (tau, v_threshold, v_reset, soft_reset, detach_reset, surrogate_alpha)
    spikes, v_out = lif_reference(current, v, reset, *neuron)
    x = x + spikes.to(x.dtype)
    if dropout:
        x = x * (dropout_keep(x.shape, dropout, seed, x.device) * (1 / (1 - dropout)))
    normed = None if weight is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x, normed, v_out


_MASK = 0xFFFFFFFF


def _mixed_int(x: int) -> int:
    """A bijection of 32-bit integers in which every input bit moves about half of the output bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _mixed(x: Tensor) -> Tensor:
    """`_mixed_int` elementwise on int64 tensors that hold 32-bit values."""
    x = _wrapping_product(x ^ (x >> 16), 0x7FEB352D)
    x = _wrapping_product(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _wrapping_product(x: Tensor, factor: int) -> Tensor:
    # In halves of the factor, as a product of two 32-bit numbers does not fit a signed 64-bit one.
    return ((x * (factor & 0xFFFF)) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & _MASK
