"""The training loss of a language model on a GPU, without the logits of all tokens in memory at once.

Tokens go through head, loss and the loss's gradient some thousands at a time: their logits are overwritten
by their gradient, which is multiplied out at once into those of the hidden states and of the head. Backward
then only scales. The kernels of the cross-entropy are those of flash-linear-attention (`fla`).
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikescale.errors import UserError
from spikescale.kernels.compiling import not_compiled

CHUNK_LOGITS = 2**26  # logits in memory at once: 128 MiB of bfloat16
MULTIPLE = 128  # of tokens in a chunk: whole tiles for the matrix products


@not_compiled
def fused_language_model_loss(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, regulariser: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`language_model_loss(hidden @ head_weight.T, targets, regulariser)`, value and gradients.

    Args:
        hidden: (B, T, C), what the model's head reads.
        head_weight: (V, C) of the bias-free head.
        targets: (B, T) int64, 0 <= target < V; not checked here.
        regulariser: of the logits, as for `language_model_loss`.

    Returns:
        (loss to minimise, cross-entropy to report), float32 scalars in nats a token; only the first has a
        gradient.

    The products are computed in autocast's dtype where it is on, else in hidden's, and the loss in float32.
    Gradients are found in forward, if any are wanted, and are not differentiable again.

    Raises:
        UserError: fla is not installed.
        ValueError: shapes do not match.
    """
    width = head_weight.shape[-1]
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != width or targets.numel() == 0:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, head_weight {tuple(head_weight.shape)} and targets"
            f" {tuple(targets.shape)} do not match, or hold no token"
        )
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    rows, labels = hidden.reshape(-1, width), targets.reshape(-1).contiguous()
    # Triton launches on the current device, whatever the tensors are on.
    device = torch.cuda.device(hidden.device) if hidden.is_cuda else contextlib.nullcontext()
    with torch.autocast(kind, enabled=False), device:
        return _FusedLoss.apply(rows, head_weight, labels, regulariser, dtype, wanted)


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """Tokens whose logits are in memory together: about CHUNK_LOGITS logits, of equal chunks."""
    chunks = max(1, -(-tokens * vocabulary // CHUNK_LOGITS))
    return -(-tokens // chunks // MULTIPLE) * MULTIPLE


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        regulariser: float,
        dtype: torch.dtype,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        loss, cross_entropy, grad_rows, grad_weight = _forward(
            rows, head_weight, targets, regulariser, dtype, wanted
        )
        ctx.mark_non_differentiable(cross_entropy)
        ctx.save_for_backward(grad_rows, grad_weight)
        return loss, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weight = ctx.saved_tensors
        return grad_rows * grad_loss, grad_weight * grad_loss, None, None, None, None


def _forward(
    rows: Tensor, head_weight: Tensor, targets: Tensor, regulariser: float, dtype: torch.dtype, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, cross-entropy, gradients of rows and head_weight), the latter None unless `wanted`."""
    cross_entropy_fwd, cross_entropy_bwd = _kernels()
    tokens, vocabulary = len(rows), len(head_weight)
    low_rows, weight = rows.to(dtype), head_weight.to(dtype)
    entropies = torch.empty(tokens, dtype=torch.float32, device=rows.device)
    largest = torch.zeros_like(entropies)
    grad_rows = torch.empty_like(rows) if wanted else None
    grad_weight = torch.zeros_like(head_weight) if wanted else None
    share = torch.full((1,), 1 / tokens, dtype=torch.float32, device=rows.device)
    for part in _parts(tokens, chunk_tokens(tokens, vocabulary)):
        logits = low_rows[part] @ weight.T
        # fla's lse and class counts are for vocabularies split over processes, but backward wants them.
        entropies[part], _, lse, classes, first = cross_entropy_fwd(logits, targets[part])
        if regulariser:
            peaks, places = logits.max(dim=-1, keepdim=True)
            largest[part] = peaks.squeeze(-1)
        if grad_rows is None or grad_weight is None:
            continue
        cross_entropy_bwd(
            logits,
            targets[part],
            lse,
            share.expand(len(logits)),
            total_classes=classes,
            class_start_idx=first,
            inplace_backward=True,
        )
        if regulariser:
            logits.scatter_add_(-1, places, (peaks.float() * (regulariser / tokens)).to(dtype))
        grad_rows[part] = logits @ weight
        grad_weight += logits.T @ low_rows[part]
    cross_entropy = entropies.mean()
    loss = cross_entropy + 0.5 * regulariser * largest.square().mean()
    return loss, cross_entropy, grad_rows, grad_weight


def _parts(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def _kernels() -> tuple[Any, Any]:
    try:
        from fla.modules.fused_cross_entropy.ops import cross_entropy_bwd, cross_entropy_fwd
    except ImportError as error:
        raise UserError(
            f"the fused loss needs flash-linear-attention ({error}); pip install 'spikescale[gpu]'"
        ) from None
    return cross_entropy_fwd, cross_entropy_bwd
