"""Loss over a split while training, shared between the ranks and counted exactly once."""

from collections.abc import Callable
from typing import Any

import torch

from spikescale.evaluation.language_model import (
    LanguageModelResult,
    TokenLosses,
    batches_of_windows,
    document_resets,
    inputs_and_targets,
    summed_loss,
    windows,
)
from spikescale.parallel import Layout


@torch.no_grad()
def validate(
    engine: Any,
    tokens: Any,
    *,
    context_length: int,
    batch_size: int,
    eos_id: int,
    layout: Layout,
    device: torch.device,
    token_losses: TokenLosses,
    totals: Any,
    limit: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> LanguageModelResult:
    """Mean loss over the first `limit` tokens of a split (None: all), the windows dealt out to the ranks.

    Every rank makes the same number of forward passes, padded by ones that do not count, because
    under ZeRO 3 a pass is a joint act. Ranks of one tensor group hold parts of one model and read the same
    windows. tokens: `len()` and `[a:b]` giving int64 arrays; token_losses: of the logits that the
    model gives; totals: the split's tokens, bytes and characters; progress: called after each pass.
    """
    count = len(tokens) if limit is None else min(limit, len(tokens))
    batches = list(batches_of_windows(windows(count, context_length, context_length), batch_size))
    nats, scored = 0.0, 0
    was_training = engine.module.training
    engine.eval()
    readers, reader = layout.world_size // layout.tensor, layout.rank // layout.tensor
    for first in range(0, len(batches), readers):
        mine = first + reader
        batch = batches[min(mine, len(batches) - 1)]
        inputs, targets = inputs_and_targets(tokens, batch, eos_id)
        inputs = inputs.to(device)
        logits, _ = engine(inputs, **document_resets(engine.module, inputs, eos_id))
        if mine < len(batches):
            nats += summed_loss(logits, targets.to(device), batch[0].scored, token_losses)
            scored += len(batch) * batch[0].scored
        progress()
    engine.train(was_training)
    sums = torch.tensor([nats, scored], dtype=torch.float64, device=device)
    if layout.world_size > 1:
        torch.distributed.all_reduce(sums)
        sums /= layout.tensor
    nats, scored = float(sums[0]), round(float(sums[1]))
    if scored != count:
        raise AssertionError(f"{scored} tokens were scored, {count} were to be")
    return LanguageModelResult.from_sum(
        nats,
        count,
        split_tokens=totals.tokens,
        split_bytes=totals.bytes,
        split_characters=totals.characters,
    )
