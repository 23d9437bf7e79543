"""Generated text: tokens decoded as they come."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from spikescale.inference.generate import generate
from spikescale.inference.sampling import SamplingSettings

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer
    from spikescale.model import SpikeGPT


def stream_text(
    model: "SpikeGPT",
    tokenizer: "Tokenizer",
    prompt: str,
    *,
    samples: int = 1,
    settings: SamplingSettings | None = None,
) -> Iterator[list[str]]:
    """Continue `prompt` in `samples` ways; yield what each token added to each text (often nothing).

    A character is yielded when its last byte has come. The end of a document (EOS) is not part of the
    text; without `stop_at_eos` it is written as an empty line between two documents.
    """
    settings = settings or SamplingSettings()
    ids = torch.tensor([int(token) for token in tokenizer.encode(prompt)], dtype=torch.long)
    decoders = [tokenizer.stream_decoder() for _ in range(samples)]
    ended = [False] * samples
    prompts = ids.expand(samples, -1)
    drawn = generate(
        model, prompts, eos_id=tokenizer.eos_id, settings=settings, vocab_size=tokenizer.vocab_size
    )
    for tokens in drawn:
        pieces = []
        for index, token in enumerate(tokens.tolist()):
            if ended[index]:
                pieces.append("")
            elif token != tokenizer.eos_id:
                pieces.append(decoders[index].push(token))
            else:
                pieces.append(decoders[index].finish())
                decoders[index] = tokenizer.stream_decoder()
                if settings.stop_at_eos:
                    ended[index] = True
                else:
                    pieces[index] += "\n\n"
        yield pieces
    yield [decoder.finish() for decoder in decoders]


def complete(
    model: "SpikeGPT",
    tokenizer: "Tokenizer",
    prompt: str,
    *,
    samples: int = 1,
    settings: SamplingSettings | None = None,
) -> list[str]:
    """`samples` continuations of `prompt` as whole texts, without the prompt itself."""
    texts = [""] * samples
    for pieces in stream_text(model, tokenizer, prompt, samples=samples, settings=settings):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts
