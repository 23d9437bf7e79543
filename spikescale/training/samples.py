"""From a batch of samples to what the model reads: shorter rows, document boundaries, masked targets."""

import torch
from torch import Tensor

from spikescale.config import DataConfig

IGNORED = -100  # a target that has no loss; torch's default


def context_length_at(step: int, data: DataConfig, context_length: int) -> int:
    """Tokens of a row in step number `step`, from 1, as `data.curriculum` says."""
    for stage in data.curriculum:
        if step <= stage.until_step:
            return stage.context_length
    return context_length


def shortened(samples: Tensor, context_length: int) -> Tensor:
    """Samples (B, T + 1) cut into rows (B T / t, t + 1) of t = `context_length` inputs, in order.

    The tokens, and so the data that a step consumes, stay the same; rows of one sample follow one another and
    share the token that is target and then input.
    """
    if samples.shape[1] - 1 == context_length:
        return samples
    return samples.unfold(1, context_length + 1, context_length).reshape(-1, context_length + 1)


def document_starts(inputs: Tensor, eos_id: int) -> Tensor:
    """Where the state is cleared before a token is read: at each end of a document. (B, T) bool.

    The end-of-document token thus opens the next document, as it opens a generated one and a split.
    """
    return inputs == eos_id


def without_document_starts(inputs: Tensor, targets: Tensor, eos_id: int) -> Tensor:
    """The targets (B, T), those that begin a document replaced by IGNORED."""
    return torch.where(inputs == eos_id, IGNORED, targets)
