"""The training loss of a language model."""

from torch import Tensor
from torch.nn import functional as F


def language_model_loss(
    logits: Tensor, targets: Tensor, regulariser: float = 0.0, masked: bool = False
) -> tuple[Tensor, Tensor]:
    """(loss to minimise, cross-entropy to report), float32 scalars in nats a token.

    logits (B, T, V), targets (B, T) int64. The first adds RWKV's logit regulariser, which keeps the
    logits from drifting: regulariser / 2 * mean over tokens of (largest logit)^2, whose gradient is
    regulariser / (B T) * (largest logit) at that logit and 0 elsewhere.

    masked: some targets are -100 and have no loss. They count in the mean, as 0, so that it does not depend
    on how a batch is divided over ranks and forward passes.
    """
    logits = logits.float().flatten(0, -2)
    if masked:
        cross_entropy = F.cross_entropy(logits, targets.flatten(), reduction="sum") / targets.numel()
    else:
        cross_entropy = F.cross_entropy(logits, targets.flatten())
    if regulariser == 0:
        return cross_entropy, cross_entropy.detach()
    largest = logits.max(dim=-1).values
    return cross_entropy + 0.5 * regulariser * largest.square().mean(), cross_entropy.detach()
