"""What follows a sub-block, in one pass: neurons, residual sum, dropout, LayerNorm: `lif_residual_norm`."""

import torch
from torch import Tensor

from spikescale.kernels.backend import choose_backend
from spikescale.kernels.lif_norm.reference import lif_residual_norm_reference

__all__ = ["lif_residual_norm"]


def lif_residual_norm(
    x: Tensor,
    current: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    tau: float | Tensor = 2.0,
    v_threshold: float | Tensor = 1.0,
    v_reset: float = 0.0,
    soft_reset: bool = False,
    detach_reset: bool = False,
    surrogate_alpha: float = 2.0,
    dropout: float = 0.0,
    seed: int = 0,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """x' = dropout(x + LIF(current)) and LayerNorm(x'), without a spike ever reaching memory.

    The SEW residual of SpikeGPT (Sec. 3.3) and the normalisation that the next sub-block starts with.

    Args:
        x: (B, T, C) float32 or float64, the residual stream, T >= 1.
        current: (B, T, C) float32, bfloat16, float16 or float64, what drives the neurons.
        v: (B, C) membrane before the first token, in x's dtype; None: zeros.
        weight, bias: (C,) of the LayerNorm, in x's dtype; None: no LayerNorm.
        tau, v_threshold, v_reset, soft_reset, detach_reset, surrogate_alpha, reset: as for `lif`.
        dropout: share of the elements of x + spikes set to 0, the others being divided by 1 - dropout;
            0 <= dropout < 1. Which ones is a pure function of `seed` and the place in the tensor
            (`dropout_keep` in `reference.py`), so that backward needs no mask.
        seed: 0 <= seed < 2^63.
        backend: see `spikescale.kernels.backend`.

    Returns:
        x' (B, T, C), LayerNorm(x') (None without `weight`), and the final membrane (B, C).

    Raises:
        UserError: the backend is unknown, or cannot serve these tensors.
        ValueError: shapes or dtypes do not match.
    """
    if x.dim() != 3 or x.shape[1] == 0 or current.shape != x.shape:
        raise ValueError(
            "x and current must be (batch, time, channels) with time >= 1,"
            f" not {tuple(x.shape)} and {tuple(current.shape)}"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64, not {x.dtype}")
    if v is None:
        v = x.new_zeros(x.shape[0], x.shape[2])
    if v.shape != (x.shape[0], x.shape[2]) or v.dtype != x.dtype:
        raise ValueError(f"v must be {(x.shape[0], x.shape[2])} {x.dtype}, not {tuple(v.shape)} {v.dtype}")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must be given together")
    for name, vector in (("weight", weight), ("bias", bias), ("tau", tau), ("v_threshold", v_threshold)):
        if isinstance(vector, Tensor) and (vector.shape != x.shape[2:] or vector.dtype != x.dtype):
            raise ValueError(
                f"{name} must be {tuple(x.shape[2:])} {x.dtype}, not {tuple(vector.shape)} {vector.dtype}"
            )
    if reset is not None and (reset.shape != x.shape[:2] or reset.dtype != torch.bool):
        raise ValueError(f"reset must be {tuple(x.shape[:2])} bool, not {tuple(reset.shape)} {reset.dtype}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    neuron = (tau, v_threshold, v_reset, soft_reset, detach_reset, surrogate_alpha)
    dtype = current.dtype if x.dtype == torch.float32 else x.dtype
    chosen = choose_backend("lif_norm", backend, x.device.type, dtype)
    if chosen == "reference":
        return lif_residual_norm_reference(x, current, v, weight, bias, eps, *neuron, dropout, seed, reset)
    if chosen == "triton":
        from spikescale.kernels.lif_norm.triton import lif_residual_norm_triton

        return lif_residual_norm_triton(x, current, v, weight, bias, eps, *neuron, dropout, seed, reset)
    from spikescale.kernels.lif_norm.cpu import lif_residual_norm_cpu

    return lif_residual_norm_cpu(x, current, v, weight, bias, eps, *neuron, dropout, seed, reset, chosen)
