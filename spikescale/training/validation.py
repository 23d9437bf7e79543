"""Loss over a split while training, shared between the ranks and counted exactly once."""

from typing import Any

import torch

from spikescale.evaluation.language_model import (
    LanguageModelResult,
    batches_of_windows,
    inputs_and_targets,
    summed_loss,
    windows,
)
from spikescale.training.bootstrap import Process


@torch.no_grad()
def validate(
    engine: Any,
    tokens: Any,
    *,
    context_length: int,
    batch_size: int,
    eos_id: int,
    process: Process,
    totals: Any,
    limit: int | None = None,
) -> LanguageModelResult:
    """Mean loss over the first `limit` tokens of a split (None: all), the windows dealt out to the ranks.

    Every rank makes the same number of forward passes, padded by ones that do not count, because
    under ZeRO 3 a pass is a joint act. tokens: `len()` and `[a:b]` giving int64 arrays; totals: the
    split's tokens, bytes and characters.
    """
    count = len(tokens) if limit is None else min(limit, len(tokens))
    batches = list(batches_of_windows(windows(count, context_length, context_length), batch_size))
    nats, scored = 0.0, 0
    was_training = engine.module.training
    engine.eval()
    for first in range(0, len(batches), process.world_size):
        mine = first + process.rank
        batch = batches[min(mine, len(batches) - 1)]
        inputs, targets = inputs_and_targets(tokens, batch, eos_id)
        logits, _ = engine(inputs.to(process.device))
        if mine < len(batches):
            nats += summed_loss(logits, targets.to(process.device), batch[0].scored)
            scored += len(batch) * batch[0].scored
    engine.train(was_training)
    sums = torch.tensor([nats, scored], dtype=torch.float64, device=process.device)
    if process.world_size > 1:
        torch.distributed.all_reduce(sums)
    nats, scored = float(sums[0]), int(sums[1])
    if scored != count:
        raise AssertionError(f"{scored} tokens were scored, {count} were to be")
    return LanguageModelResult.from_sum(
        nats,
        count,
        split_tokens=totals.tokens,
        split_bytes=totals.bytes,
        split_characters=totals.characters,
    )
