"""LayerNorm over the channels: `layer_norm`."""

from torch import Tensor
from torch.nn import functional as F

from spikescale.kernels.backend import choose_backend

__all__ = ["layer_norm"]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    The definition is torch's. The C++ implementation, for float32, is that of `lif_residual_norm`: fused and
    alone give the same bits, so that a model computes the same whether or not its neurons are fused. The
    Triton one launches flash-linear-attention's kernels. Where neither can serve, "auto" takes torch's own.

    Args:
        x: (..., C) in the dtype of `weight`.
        weight, bias: (C,) of one floating dtype; what is narrower than float32 is computed in float32.
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
    if chosen == "reference":
        return F.layer_norm(x, channels, weight, bias, eps)
    if chosen == "triton":
        from spikescale.kernels.layer_norm.triton import layer_norm_triton

        return layer_norm_triton(x, weight, bias, eps)
    from spikescale.kernels.layer_norm.cpu import layer_norm_cpu

    return layer_norm_cpu(x, weight, bias, eps, chosen)
