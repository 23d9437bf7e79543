"""What every tokenizer offers."""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from spikescale.files import write_bytes, write_json

DESCRIPTION = "spikescale_tokenizer.json"
VERSION = 1


class StreamDecoder(Protocol):
    """Turns ids that arrive one by one into text."""

    def push(self, token_id: int) -> str:
        """The text that became complete with this id; never half a character, often empty."""
        ...

    def finish(self) -> str:
        """What is left at the end; a character that never became complete is U+FFFD."""
        ...


class Tokenizer(ABC):
    """Text to ids and back.

    Text never produces the end-of-document id or any other special id, whatever it spells.

    Attributes:
        kind: byte, char, gpt2, neox, tokenizer.json, sentencepiece or syllable; `+conditions` is added by
            ConditionedTokenizer.
        vocab_size: ids are below it.
        eos_id: ends every document.
        files: the files, by name, that the tokenizer consists of.
        sha256: fingerprint of all that decides ids; equal fingerprints give equal ids.
        unk_id: stands for what the vocabulary cannot spell; None where there is no such id.
    """

    unk_id: int | None = None

    def __init__(self, kind: str, vocab_size: int, eos_id: int, files: Mapping[str, bytes]) -> None:
        self.kind = kind
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.files = dict(files)
        self.sha256 = fingerprint(kind, vocab_size, eos_id, files)

    @property
    def text_tokenizer(self) -> "Tokenizer":
        """What encodes text: this tokenizer, or the one inside it."""
        return self

    @property
    def text_vocab_size(self) -> int:
        """Ids below it, the end of a document among them, are of text; ids from it on are conditions."""
        return self.text_tokenizer.vocab_size

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without an end-of-document id."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for special tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without an end-of-document id."""
        return self.encode_batch([text])[0]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as integer arrays, without a Python object for each id where that is possible."""
        return [np.asarray(ids, dtype=np.int64) for ids in self.encode_batch(texts)]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that the ids stand for, special tokens left out."""
        return b"".join(self.token_bytes(int(token_id)) for token_id in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the ids stand for; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """A fresh incremental decoder whose outputs concatenate to `decode` of all ids."""
        return ByteStreamDecoder(self)

    def save(self, folder: Path) -> None:
        """Write the folder that `load_tokenizer` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            write_bytes(folder / name, content)
        description = {
            "version": VERSION,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "files": sorted(self.files),
            "sha256": self.sha256,
        }
        write_json(folder / DESCRIPTION, description)


class ByteStreamDecoder:
    """Incremental UTF-8 decoding of the tokens' bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See StreamDecoder."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(token_id)))

    def finish(self) -> str:
        """See StreamDecoder."""
        return self._decoder.decode(b"", final=True)


def fingerprint(kind: str, vocab_size: int, eos_id: int, files: Mapping[str, bytes]) -> str:
    """SHA-256, in hexadecimal, over everything that decides ids."""
    parts = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    described = json.dumps([kind, vocab_size, eos_id, parts], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()
