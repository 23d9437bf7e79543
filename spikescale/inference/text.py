"""Generated text: tokens decoded as they come."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikescale.errors import UserError
from spikescale.inference.decoder import Weights
from spikescale.inference.generate import Engine, generate
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
    engine: Engine = "auto",
    weights: Weights = "float32",
    conditions: Sequence[tuple[str, str]] = (),
) -> Iterator[list[str]]:
    """Continue `prompt` in `samples` ways; yield what each token added to each text (often nothing).

    A character is yielded when its last byte has come. The end of a document (EOS) is not part of the
    text; without `stop_at_eos` it is written as an empty line between two documents. `engine` and `weights`
    are those of `generate`. `conditions` are (key, value) pairs that the tokenizer has ids for; with them the
    text begins as such a document does. Raises UserError for others.
    """
    settings = settings or SamplingSettings()
    ids = torch.tensor(
        [*start_of_document(tokenizer, conditions), *map(int, tokenizer.encode(prompt))], dtype=torch.long
    )
    drawn = generate(
        model,
        ids.expand(samples, -1),
        eos_id=tokenizer.eos_id,
        settings=settings,
        vocab_size=tokenizer.vocab_size,
        engine=engine,
        weights=weights,
    )
    return _pieces(drawn, tokenizer, samples, settings.stop_at_eos)


def start_of_document(tokenizer: "Tokenizer", conditions: Sequence[tuple[str, str]]) -> list[int]:
    """The ids before the text of a document with these conditions; none without conditions.

    Raises UserError for conditions that the tokenizer has no ids for.
    """
    if not conditions:
        return []
    from spikescale.data_pipeline.tokenizers.conditioned import ConditionedTokenizer

    if not isinstance(tokenizer, ConditionedTokenizer):
        key, value = conditions[0]
        raise UserError(
            f"condition {key}={value}: the model's data were prepared without --condition-on, it knows none"
        )
    return [tokenizer.eos_id, *tokenizer.condition_ids(conditions)]


def _pieces(
    drawn: Iterator[Tensor], tokenizer: "Tokenizer", samples: int, stop_at_eos: bool
) -> Iterator[list[str]]:
    decoders = [tokenizer.stream_decoder() for _ in range(samples)]
    ended = [False] * samples
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
                if stop_at_eos:
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
