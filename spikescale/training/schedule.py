"""The learning rate as a pure function of the step, so that resuming needs no state."""

import math

from spikescale.config import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of the optimizer step number `step` (0 is the first).

    It rises linearly over `warmup_steps`, then falls from `lr` to `min_lr` at the last step: along
    half a cosine, along a line, or (wsd: warm-up, stable, decay) staying at `lr` until the last
    `decay_fraction` of the steps and then along a line. `constant` stays at `lr`.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    last = train.steps - 1
    if train.schedule == "constant":
        return train.lr
    start = train.warmup_steps
    if train.schedule == "wsd":
        start = max(start, train.steps - math.ceil(train.decay_fraction * train.steps))
    if step < start or last <= start:
        return train.lr
    progress = min(1.0, (step - start) / (last - start))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.min_lr + (train.lr - train.min_lr) * share
