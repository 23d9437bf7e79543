"""Token shift and its learnt mixtures, the input of every projection of a block: `token_mix`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spikescale.kernels.backend import choose_backend
from spikescale.kernels.token_mix.reference import token_mix_reference

__all__ = ["token_mix"]


def token_mix(
    x: Tensor,
    mus: Sequence[Tensor],
    last: Tensor | None = None,
    reset: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Every token mixed with the one before it, once for each of `mus`.

        out_n[t] = x[t-1] + mu_n (x[t] - x[t-1])  =  mu_n x[t] + (1 - mu_n) x[t-1]

    RWKV-4's token shift (SpikeGPT Sec. 3.4). All outputs are computed in one pass over x, in x's dtype or
    float32 if that is narrower.

    Args:
        x: (B, T, C) float32, bfloat16, float16 or float64, T >= 1.
        mus: one to three tensors (C,), any floating dtype.
        last: (B, C), x of the token before the first one, any floating dtype; None: zeros.
        reset: (B, T) bool; where true the token has no predecessor: zeros.
        dtype: of the outputs; None: x's.
        backend: see `spikescale.kernels.backend`.

    Returns:
        One contiguous (B, T, C) tensor for each of `mus`.

    Raises:
        UserError: the backend is unknown, or cannot serve these tensors.
        ValueError: shapes or dtypes do not match.
    """
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, time, channels) with time >= 1, not {tuple(x.shape)}")
    if not 1 <= len(mus) <= 3:
        raise ValueError(f"mus must hold one to three tensors, not {len(mus)}")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    for mu in mus:
        if mu.shape != x.shape[2:]:
            raise ValueError(f"mu must be {tuple(x.shape[2:])}, not {tuple(mu.shape)}")
    if last is None:
        last = x.new_zeros(x.shape[0], x.shape[2], dtype=compute)
    if last.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"last must be {(x.shape[0], x.shape[2])}, not {tuple(last.shape)}")
    if reset is not None and (reset.shape != x.shape[:2] or reset.dtype != torch.bool):
        raise ValueError(f"reset must be {tuple(x.shape[:2])} bool, not {tuple(reset.shape)} {reset.dtype}")
    last, dtype = last.to(compute), x.dtype if dtype is None else dtype
    mus = [mu.to(compute) for mu in mus]
    chosen = choose_backend("token_mix", backend, x.device.type, x.dtype)
    if chosen == "reference":
        return token_mix_reference(x, mus, last, reset, dtype)
    if chosen == "triton":
        from spikescale.kernels.token_mix.triton import token_mix_triton

        return token_mix_triton(x, mus, last, reset, dtype)
    from spikescale.kernels.token_mix.cpu import token_mix_cpu

    return token_mix_cpu(x, mus, last, reset, dtype, chosen)
