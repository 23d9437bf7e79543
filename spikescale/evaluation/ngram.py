"""A byte trigram model: the baseline that any trained model must beat.

Interpolated Witten-Bell smoothing (Chen and Goodman, An Empirical Study of Smoothing Techniques for
Language Modeling, 1998, Sec. 2.4) from trigram to bigram, unigram and 1/256:

    P(w | context) = (count(context w) + T(context) P(w | shorter context)) / (count(context) + T(context))

where T(context) is the number of different bytes seen after the context. A context never seen hands
over to the shorter one entirely, so every distribution adds up to 1.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.data_pipeline.manifest import Manifest
    from spikescale.data_pipeline.tokenizers import Tokenizer

SYMBOLS = 256
END = 255  # ends each document; never occurs in UTF-8
BLOCK = 1 << 22  # bytes counted at a time: bounds the memory, whatever the size of the text

Floats = NDArray[np.float64]


class ByteTrigram:
    """Counts of byte trigrams, and the smoothed probabilities that follow from them."""

    def __init__(self, counts: NDArray[np.int64]) -> None:
        """From `counts` (256, 256, 256): how often each byte (last axis) followed each two bytes."""
        self._trigrams = counts
        self._context = counts.sum(axis=2)  # (256, 256)
        self._kinds = np.count_nonzero(counts, axis=2)
        # Each byte has two bytes before it, so the sum over the first of them counts every bigram.
        bigrams = counts.sum(axis=0)
        unigrams = bigrams.sum(axis=0)
        uniform = np.full(SYMBOLS, 1 / SYMBOLS)
        self.unigram: Floats = _smoothed(unigrams, uniform)
        self.bigram: Floats = _smoothed(bigrams, np.broadcast_to(self.unigram, (SYMBOLS, SYMBOLS)))

    @classmethod
    def fit(cls, documents: Iterable[bytes]) -> "ByteTrigram":
        """Count the bytes of `documents`, each followed by END. Raises UserError when there are none."""
        counts = np.zeros(SYMBOLS**3, dtype=np.int64)
        empty = True
        for first, second, byte in _contexts(documents):
            counts += np.bincount((first << 16) | (second << 8) | byte, minlength=SYMBOLS**3)
            empty = False
        if empty:
            raise UserError("the trigram baseline needs at least one training document")
        return cls(counts.reshape(SYMBOLS, SYMBOLS, SYMBOLS))

    def distribution(self, first: int, second: int) -> Floats:
        """Probabilities (256,) of the byte that comes after the bytes `first`, `second`."""
        return _smoothed(self._trigrams[first, second], self.bigram[second])

    def bits_per_byte(self, documents: Iterable[bytes], order: int = 3) -> float:
        """Bits to encode `documents`, END after each included, divided by their bytes without END.

        `order`: 3 for the trigram model, 2 for the bigram and 1 for the unigram model inside it.
        Raises UserError when there is no byte to divide by.
        """
        bits, symbols, ends = 0.0, 0, 0
        for first, second, byte in _contexts(documents):
            bits -= float(np.log2(self._probabilities(first, second, byte, order)).sum())
            symbols += len(byte)
            ends += int(np.count_nonzero(byte == END))
        if symbols == ends:
            raise UserError("no bytes to score: the split is empty")
        return bits / (symbols - ends)

    def _probabilities(
        self, first: NDArray[np.int64], second: NDArray[np.int64], byte: NDArray[np.int64], order: int
    ) -> Floats:
        if order == 1:
            return self.unigram[byte]
        shorter = self.bigram[second, byte]
        if order == 2:
            return shorter
        count, kinds = self._context[first, second], self._kinds[first, second]
        mixed = (self._trigrams[first, second, byte] + kinds * shorter) / np.maximum(count + kinds, 1)
        return np.where(count > 0, mixed, shorter)


def trigram_baseline(manifest: "Manifest", tokenizer: "Tokenizer", splits: Sequence[str]) -> dict[str, float]:
    """Bits per byte over each of `splits`, whole, of a trigram model fitted on the training split's text."""
    from spikescale.data_pipeline.stream import iterate_documents

    def documents(split: str) -> Iterator[bytes]:
        # decode_bytes leaves the end of the document out; the model adds its own.
        return (tokenizer.decode_bytes(ids.tolist()) for ids in iterate_documents(manifest, split))

    model = ByteTrigram.fit(documents("train"))
    return {split: model.bits_per_byte(documents(split)) for split in splits}


def _smoothed(counts: NDArray[np.int64], shorter: Floats) -> Floats:
    """Witten-Bell along the last axis: `counts` mixed with the distributions of the shorter contexts."""
    total = counts.sum(axis=-1, keepdims=True)
    kinds = np.count_nonzero(counts, axis=-1, keepdims=True)
    return np.where(total > 0, (counts + kinds * shorter) / np.maximum(total + kinds, 1), shorter)


def _contexts(
    documents: Iterable[bytes],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Blocks of (byte before the last, last byte, byte). Documents follow one another, after END END."""
    before = bytes((END, END))
    for block in _blocks(documents):
        values = np.frombuffer(before + block, dtype=np.uint8).astype(np.int64)
        yield values[:-2], values[1:-1], values[2:]
        before = (before + block)[-2:]


def _blocks(documents: Iterable[bytes]) -> Iterator[bytes]:
    """The documents, each with END, joined and cut into blocks of at most BLOCK bytes."""
    pending = bytearray()
    for document in documents:
        pending += document
        pending.append(END)
        while len(pending) >= BLOCK:
            yield bytes(pending[:BLOCK])
            del pending[:BLOCK]
    if pending:
        yield bytes(pending)
