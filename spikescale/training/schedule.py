"""The learning rate as a pure function of the step, so that resuming needs no state."""

import math

from spikescale.config import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of the optimizer step number `step` (0 is the first).

    It rises linearly over `warmup_steps`, then falls from `lr` to `min_lr` at the last step: along
    half a cosine, along a line, or (wsd: warm-up, stable, decay) staying at `lr` until the last
    `decay_fraction` of the steps and then along a line, or by 1 - sqrt of the way (`decay_shape`; Haegele et
    al. 2024). `constant` stays at `lr`.

    Up to `decay_start` a wsd run of any length is the same run: one of constant rate serves all of them.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    last = train.steps - 1
    if train.schedule == "constant":
        return train.lr
    start = train.warmup_steps
    if train.schedule == "wsd":
        start = decay_start(train)
    if step < start or last <= start:
        return train.lr
    progress = min(1.0, (step - start) / (last - start))
    share = 1 - progress
    if train.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif train.schedule == "wsd" and train.decay_shape == "1-sqrt":
        share = 1 - math.sqrt(progress)
    return train.min_lr + (train.lr - train.min_lr) * share


def decay_start(train: TrainConfig) -> int:
    """Steps of a wsd schedule that are done before its rate begins to decay."""
    return max(train.warmup_steps, train.steps - math.ceil(train.decay_fraction * train.steps))
