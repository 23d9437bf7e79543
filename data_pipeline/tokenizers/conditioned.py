"""Ids for what is known of a document beside its text: its category, its source.

As in "Metadata Conditioning Accelerates Language Model Pre-training" (Gao et al. 2025), what is known of a
document is put in front of it, so that the model learns what text goes with it and can be asked for such
text. Theirs is a line of text (the URL); here each distinct value is an id of its own after the ids of
text, which no text can spell. A model that has always seen them is worse without: they end the training
with a tenth of it on bare text; here a share of the documents, chosen by hash, is left bare all along,
which needs no second phase and keeps every batch a function of the seed alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from spikescale.data_pipeline.tokenizers.base import StreamDecoder, Tokenizer
from spikescale.errors import UserError

FILE = "conditions.json"
MOST_VALUES = 4096

Metadata = Iterable[tuple[str, str]]


class ConditionedTokenizer(Tokenizer):
    """Another tokenizer, and behind its ids one for each (key, value) of the training split's metadata.

    Args:
        inner: encodes text; its ids and its end of a document stay what they are.
        values: of each key, in the order in which they precede a document, its values.
        dropout: share of the documents that are left without.
    """

    def __init__(self, inner: Tokenizer, values: Mapping[str, Sequence[str]], dropout: float) -> None:
        if not 0 <= dropout <= 1:
            raise UserError(f"condition_dropout = {dropout}: must be from 0 to 1")
        self.inner = inner
        self.values = {key: tuple(sorted(known)) for key, known in values.items()}
        self.dropout = dropout
        self.unk_id = inner.unk_id
        pairs = [(key, value) for key, known in self.values.items() for value in known]
        if len(set(pairs)) < len(pairs):
            raise UserError("conditions: a value occurs twice")
        self._ids = {pair: inner.vocab_size + number for number, pair in enumerate(pairs)}
        content = {
            "kind": inner.kind,
            "vocab_size": inner.vocab_size,
            "eos_id": inner.eos_id,
            "dropout": dropout,
            "values": [[key, list(known)] for key, known in self.values.items()],
        }
        files = {**inner.files, FILE: json.dumps(content, ensure_ascii=True).encode()}
        super().__init__(f"{inner.kind}+conditions", inner.vocab_size + len(pairs), inner.eos_id, files)

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer inside."""
        return self.inner

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text: those of the tokenizer inside, never one of a condition."""
        return self.inner.encode_batch(texts)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as integer arrays."""
        return self.inner.encode_arrays(texts)

    def prefix(self, metadata: Metadata, digest: bytes) -> list[int]:
        """Ids that precede a document: of its known values in the order of the keys, or none.

        `digest` is the SHA-256 of its text, which decides whether the document is left without.
        """
        # Bytes 8 to 16: the first eight decide the split, which would leave one of them without.
        if int.from_bytes(digest[8:16], "big") / 2**64 < self.dropout:
            return []
        given = dict(metadata)
        pairs = [(key, given[key]) for key in self.values if key in given]
        return [self._ids[pair] for pair in pairs if pair in self._ids]

    def knows(self, pair: tuple[str, str]) -> bool:
        """Whether a (key, value) has an id; also of keys that nothing is conditioned on."""
        return pair[0] not in self.values or pair in self._ids

    def condition_ids(self, conditions: Metadata) -> list[int]:
        """Ids of the given values, in the order of the keys. Raises UserError for one that is unknown."""
        given = dict(conditions)
        for key, value in given.items():
            if key not in self.values:
                raise UserError(f"condition {key}={value}: the keys are {', '.join(self.values)}")
            if (key, value) not in self._ids:
                known = self.values[key]
                shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
                raise UserError(f"condition {key}={value}: known are {shown}")
        return [self._ids[key, given[key]] for key in self.values if key in given]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token of text; none for a condition."""
        return self.inner.token_bytes(token_id) if token_id < self.inner.vocab_size else b""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that the ids stand for, conditions left out."""
        return self.inner.decode_bytes(self._of_text(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the ids stand for, conditions left out."""
        return self.inner.decode(self._of_text(ids))

    def stream_decoder(self) -> StreamDecoder:
        """That of the tokenizer inside, which is not told of conditions."""
        return _TextOnlyDecoder(self.inner)

    def _of_text(self, ids: Sequence[int]) -> list[int]:
        return [int(token_id) for token_id in ids if token_id < self.inner.vocab_size]


class _TextOnlyDecoder:
    def __init__(self, inner: Tokenizer) -> None:
        self._decoder = inner.stream_decoder()
        self._end = inner.vocab_size

    def push(self, token_id: int) -> str:
        return self._decoder.push(token_id) if token_id < self._end else ""

    def finish(self) -> str:
        return self._decoder.finish()


def conditioned(
    tokenizer: Tokenizer, keys: Sequence[str], found: Iterable[tuple[str, str]], dropout: float
) -> ConditionedTokenizer:
    """`tokenizer` with an id for each (key, value) `found` in the training split.

    Raises UserError for a key without values, and for too many values.
    """
    values: dict[str, list[str]] = {key: [] for key in keys}
    for key, value in sorted(set(found)):
        if key in values:
            values[key].append(value)
    for key, known in values.items():
        if not known:
            raise UserError(f"--condition-on {key}: no document of the training split has it")
    total = sum(map(len, values.values()))
    if total > MOST_VALUES:
        counts = ", ".join(f"{key} {len(known)}" for key, known in values.items())
        raise UserError(
            f"--condition-on: {total} values ({counts}), at most {MOST_VALUES} are ids of their own; "
            "condition on something coarser"
        )
    return ConditionedTokenizer(tokenizer, values, dropout)


def read_conditions(content: bytes) -> dict[str, Any]:
    """What a tokenizer's conditions.json says, the values as a mapping in the order of the keys."""
    described: dict[str, Any] = json.loads(content)
    return {**described, "values": dict(described["values"])}
