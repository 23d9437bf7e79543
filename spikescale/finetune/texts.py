"""What a model is tuned on: prepared data, or files of text cut into three parts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from spikescale.errors import UserError
from spikescale.evaluation.language_model import TokenSequence
from spikescale.evaluation.texts import EvaluatedText, encoded_text, file_documents, split_text

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer

HELD_OUT = 0.05  # of the characters of raw text, for validation and again for the test


class Samples(Protocol):
    """Endless training samples in a seeded order."""

    def rows(self, start: int, count: int) -> torch.Tensor:
        """Samples start .. start + count - 1, (count, T + 1) int64."""
        ...


@dataclass(frozen=True)
class TuningText:
    """Samples to train on, and what the result is judged on."""

    samples: Samples
    train_tokens: int
    valid: EvaluatedText
    test: EvaluatedText
    identity: str  # of the data, for the record


class Windows:
    """Windows of T + 1 tokens of a sequence that follow one another by T, in a new order each epoch.

    Raises UserError for a sequence that is shorter than one.
    """

    def __init__(self, tokens: TokenSequence, context_length: int, seed: int) -> None:
        self._tokens, self._length, self._seed = tokens, context_length, seed
        self._count = (len(tokens) - 1) // context_length
        if self._count < 1:
            raise UserError(
                f"{len(tokens)} tokens to train on: too few for one sample of {context_length + 1}; "
                "give more text or a smaller --context-length"
            )

    def rows(self, start: int, count: int) -> torch.Tensor:
        """See `Samples`."""
        picked = []
        for index in range(start, start + count):
            epoch, place = divmod(index, self._count)
            order = np.random.default_rng((self._seed, epoch)).permutation(self._count)
            begin = int(order[place]) * self._length
            picked.append(np.asarray(self._tokens[begin : begin + self._length + 1], np.int64))
        return torch.from_numpy(np.stack(picked))


def prepared_text(folder: Path, tokenizer: "Tokenizer", context_length: int, seed: int) -> TuningText:
    """The splits of prepared data, which the model's tokenizer must have made."""
    from spikescale.data_pipeline.manifest import load_manifest
    from spikescale.data_pipeline.stream import TokenStream

    manifest = load_manifest(folder)
    # Its words, of which nobody asks here, are estimated by the first document's.
    valid, test = (split_text(manifest, split, tokenizer, limit=1) for split in ("valid", "test"))
    for split, text in (("valid", valid), ("test", test)):
        if not len(text.tokens):
            raise UserError(f"{folder}: its {split} split is empty, and the result is judged on it")
    stream = TokenStream(manifest, "train", context_length, seed)
    return TuningText(stream, manifest.totals("train").tokens, valid, test, manifest.sha256)


def raw_text(paths: Sequence[Path], tokenizer: "Tokenizer", context_length: int, seed: int) -> TuningText:
    """Text files: the first 90% of the characters to train on, the next 5% validation, the last 5% test."""
    from spikescale.files import sha256_text

    documents = list(file_documents(paths))
    whole = sum(map(len, documents))
    bounds = [0, round(whole * (1 - 2 * HELD_OUT)), round(whole * (1 - HELD_OUT)), whole]
    train, valid, test = (
        encoded_text(_between(documents, low, high), tokenizer) for low, high in itertools.pairwise(bounds)
    )
    for name, text in (("valid", valid), ("test", test)):
        if not len(text.tokens):
            raise UserError(f"--text: too short to set a {name} part aside ({whole} characters)")
    identity = sha256_text("\0".join(documents))
    return TuningText(Windows(train.tokens, context_length, seed), len(train.tokens), valid, test, identity)


def _between(documents: Sequence[str], low: int, high: int) -> list[str]:
    """The parts of documents at characters [low, high) of all of them, one after another."""
    parts, begin = [], 0
    for document in documents:
        piece = document[max(low - begin, 0) : max(high - begin, 0)]
        if piece:
            parts.append(piece)
        begin += len(document)
    return parts
