"""Generation in recurrent form: each token costs the same, and the state never grows."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikescale.inference.sampling import SamplingSettings, choose

if TYPE_CHECKING:
    from spikescale.model import SpikeGPT

PROMPT_CHUNK = 256


@torch.no_grad()
def generate(
    model: "SpikeGPT",
    prompts: Tensor,
    *,
    eos_id: int,
    settings: SamplingSettings,
    vocab_size: int | None = None,
    prompt_chunk: int = PROMPT_CHUNK,
) -> Iterator[Tensor]:
    """Continue `prompts` (B, T), int64, and yield one token (B,), int64, of every sample at a time.

    The prompt is read in parallel form, `prompt_chunk` tokens at a time; from then on each token is one
    forward pass of length 1 from the state that the last one left. Ids from `vocab_size` on, which pad a
    model beyond its tokenizer, are never drawn. An empty prompt (T = 0) stands for
    `eos_id`, which is what precedes a document. At most `settings.max_tokens` are produced; with
    `settings.stop_at_eos`, a sample that has ended goes on as `eos_id` and the iteration stops when all
    have ended. The model is in evaluation mode while the iteration lasts, then as it was.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    prompts = prompts.to(device)
    batch = prompts.shape[0]
    was_training = model.training
    model.eval()
    try:
        seen: Tensor | None = None
        start = prompts if prompts.shape[1] else prompts.new_full((batch, 1), eos_id)
        state = None
        for chunk in start.split(prompt_chunk, dim=1):
            logits, state = model(chunk, state)
        ended = torch.zeros(batch, dtype=torch.bool, device=device)
        for position in range(settings.max_tokens):
            last = logits[:, -1, :vocab_size]
            if settings.repetition_penalty != 1 and seen is None:
                seen = torch.zeros_like(last, dtype=torch.bool).scatter(1, prompts, True)
            tokens = choose(last, settings, generator, seen)
            if settings.stop_at_eos:
                tokens = torch.where(ended, eos_id, tokens)
                ended = ended | (tokens == eos_id)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            yield tokens
            if position + 1 == settings.max_tokens or bool(ended.all()):
                return
            logits, state = model(tokens[:, None], state)
    finally:
        model.train(was_training)
