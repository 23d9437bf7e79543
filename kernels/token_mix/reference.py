"""Token shift and its learnt mixtures, the definition."""

import torch
from torch import Tensor


def token_mix_reference(
    x: Tensor, mus: list[Tensor], last: Tensor, reset: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """Shapes and meaning as for `token_mix`; computed in the dtype of `mus`.

    The order of the operations fixes the rounding: every other implementation keeps it.
    """
    x = x.to(mus[0].dtype)
    previous = torch.cat([last.unsqueeze(1).to(x.dtype), x[:, :-1]], dim=1)
    if reset is not None:
        previous = previous.masked_fill(reset.unsqueeze(-1), 0.0)
    return [(previous + mu * (x - previous)).to(dtype) for mu in mus]
