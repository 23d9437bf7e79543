"""LayerNorm over the channels: `layer_norm`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from spikescale.kernels.backend import choose_backend

__all__ = ["layer_norm"]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    The definition and the GPU implementation are torch's. The C++ one is that of `lif_residual_norm`: fused
    and alone give the same bits, so that a model computes the same whether or not its neurons are fused.

    Args:
        x: (..., C) in the dtype of `weight`.
        weight, bias: (C,) float32 or float64.
        backend: see `spikescale.kernels.backend`.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        UserError: the backend is unknown, or cannot serve these tensors.
        ValueError: shapes or dtypes do not match.
    """
    channels = x.shape[-1:]
    if weight.shape != channels or bias.shape != channels or not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(
            f"weight and bias must be {tuple(channels)} {x.dtype}, not {tuple(weight.shape)} {weight.dtype},"
            f" {tuple(bias.shape)} {bias.dtype}"
        )
    chosen = choose_backend("layer_norm", backend, x.device.type, x.dtype)
    if chosen in ("reference", "triton") or x.dtype != torch.float32:
        return F.layer_norm(x, channels, weight, bias, eps)
    from spikescale.kernels.layer_norm.cpu import layer_norm_cpu

    return layer_norm_cpu(x, weight, bias, eps, chosen)
