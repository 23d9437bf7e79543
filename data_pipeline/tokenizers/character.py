"""Characters as ids, the vocabulary taken from the training text."""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from spikescale.data_pipeline.tokenizers.base import Tokenizer
from spikescale.errors import UserError

FILE = "characters.json"


class CharacterTokenizer(Tokenizer):
    """Ids are the ranks of characters by code point, then `<eos>`, then `<unk>`.

    A character that is not in the vocabulary becomes `<unk>` and is decoded as U+FFFD.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        ordered = sorted(set(characters))
        if not ordered:
            raise UserError("tokenizer char: the training split has no characters")
        self._characters = ordered
        self._codes = np.array([ord(character) for character in ordered], dtype=np.uint32)
        self.unk_id: int = len(ordered) + 1
        content = json.dumps("".join(ordered), ensure_ascii=True).encode()
        super().__init__("char", len(ordered) + 2, len(ordered), {FILE: content})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The rank of each character."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The rank of each character, int64."""
        arrays = []
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            ranks = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
            arrays.append(np.where(self._codes[ranks] == codes, ranks, self.unk_id).astype(np.int64))
        return arrays

    def token_bytes(self, token_id: int) -> bytes:
        """The character in UTF-8."""
        if token_id < self.eos_id:
            return self._characters[token_id].encode("utf-8")
        return b"" if token_id == self.eos_id else "\ufffd".encode()
