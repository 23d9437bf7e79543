"""Syllables as ids: the commonest ones of the training text, then characters, then bytes.

A text is cut into words (a run of letters, with the space before it) and single other characters. A
word becomes its syllables, found by pyphen's hyphenation patterns (Liang, Word Hy-phen-a-tion by
Com-put-er, 1983). A syllable outside the vocabulary becomes, the first that is known counting: its
space and the syllable without it; its characters; the UTF-8 bytes of a character that is unknown too.
So every text is encoded without loss.
"""

import functools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikescale.data_pipeline.tokenizers.base import Tokenizer
from spikescale.errors import UserError

FILE = "syllables.json"
DICTIONARY_FILE = "hyphenation.dic"
DEFAULT_SIZE = 2000
DEFAULT_LANGUAGE = "en_US"
LONGEST_WORD = 64  # letters; what is longer is no word of a language and goes by characters
CACHED_WORDS = 1 << 18

_PIECES = re.compile(r" ?[^\W\d_]+|[\s\S]")


class SyllableTokenizer(Tokenizer):
    """Ids are the syllables in the order given, then the characters, then 256 bytes, then `<eos>`.

    Args:
        syllables: at least two characters each, a leading space counting as one.
        characters: those of the training text.
        dictionary: the content of the hyphenation dictionary (hunspell's hyph_*.dic), which is kept
            with the tokenizer, because it decides ids.
    """

    def __init__(self, syllables: Sequence[str], characters: Iterable[str], dictionary: bytes) -> None:
        ordered = sorted(set(characters))
        pieces = [*syllables, *ordered]
        self._ids = {piece: number for number, piece in enumerate(pieces)}
        if len(self._ids) < len(pieces):
            raise UserError("tokenizer syllable: a syllable occurs twice, or is a single character")
        self._bytes = [piece.encode("utf-8") for piece in pieces] + [bytes((byte,)) for byte in range(256)]
        self._first_byte = len(pieces)
        self._hyphenation = _patterns(dictionary)
        self._known: dict[str, tuple[int, ...]] = {}
        self.syllables = len(syllables)
        content = {"syllables": list(syllables), "characters": "".join(ordered)}
        files = {FILE: json.dumps(content, ensure_ascii=True).encode(), DICTIONARY_FILE: dictionary}
        super().__init__("syllable", len(self._bytes) + 1, len(self._bytes), files)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "SyllableTokenizer":
        """The tokenizer whose `files` these are."""
        content = json.loads(files[FILE])
        return cls(content["syllables"], content["characters"], files[DICTIONARY_FILE])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        known, learn = self._known, self._word
        encoded = []
        for text in texts:
            ids: list[int] = []
            for piece in _PIECES.findall(text):
                found = known.get(piece)
                ids += learn(piece) if found is None else found
            encoded.append(ids)
        return encoded

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64."""
        return [np.array(ids, dtype=np.int64) for ids in self.encode_batch(texts)]

    def token_bytes(self, token_id: int) -> bytes:
        """The syllable or character in UTF-8, or the byte."""
        return b"" if token_id == self.eos_id else self._bytes[token_id]

    def _word(self, piece: str) -> tuple[int, ...]:
        ids = tuple(token_id for part in self._hyphenation.cut(piece) for token_id in self._syllable(part))
        if len(self._known) >= CACHED_WORDS:
            self._known.clear()
        self._known[piece] = ids
        return ids

    def _syllable(self, part: str) -> list[int]:
        if part in self._ids:
            return [self._ids[part]]
        if len(part) > 1 and part[0] == " ":
            return self._syllable(" ") + self._syllable(part[1:])
        if len(part) > 1:
            return [token_id for character in part for token_id in self._syllable(character)]
        return [self._first_byte + byte for byte in part.encode("utf-8")]


class Hyphenation:
    """Cuts words into syllables; the parts together are always the word."""

    def __init__(self, pyphen: Any) -> None:
        self._pyphen = pyphen

    def cut(self, piece: str) -> list[str]:
        """The syllables of a word, whose leading space stays with the first."""
        start = 1 if piece[0] == " " else 0
        word = piece[start:]
        if not 3 < len(word) <= LONGEST_WORD:
            return [piece]
        # Where hyphenation would change letters (German "ck"), the cut alone is taken.
        ends = [start + int(position) for position in self._pyphen.positions(word)]
        if len(self._pyphen.hd.cache) >= CACHED_WORDS:
            self._pyphen.hd.cache.clear()
        return [piece[begin:end] for begin, end in zip([0, *ends], [*ends, len(piece)], strict=True)]


def hyphenation_dictionary(language: str) -> bytes:
    """The content of pyphen's dictionary of a language. Raises UserError for an unknown language."""
    import pyphen

    if language not in pyphen.LANGUAGES:
        raise UserError(
            f"tokenizer syllable: no hyphenation of language {language!r}; there are "
            f"{', '.join(sorted(pyphen.LANGUAGES))}"
        )
    return Path(pyphen.LANGUAGES[language]).read_bytes()


def count_syllables(texts: Iterable[str], language: str) -> Counter[str]:
    """How often each syllable of two characters or more occurs, the space before a word included.

    Counts of several parts of a corpus add up to those of the whole.
    """
    hyphenation = _patterns(hyphenation_dictionary(language))
    words: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for text in texts:
        words.update(piece for piece in _PIECES.findall(text) if 1 < len(piece) <= LONGEST_WORD)
        if len(words) >= CACHED_WORDS:
            _add_syllables(counts, words, hyphenation)
            words.clear()
    _add_syllables(counts, words, hyphenation)
    return counts


def _add_syllables(counts: Counter[str], words: Counter[str], hyphenation: Hyphenation) -> None:
    for word, count in words.items():
        for part in hyphenation.cut(word):
            if len(part) > 1:
                counts[part] += count


def learn_syllables(
    counts: Mapping[str, int], characters: Iterable[str], size: int, language: str
) -> SyllableTokenizer:
    """The tokenizer of the `size` commonest syllables (equally common ones in the order of code points)."""
    ranked = sorted(counts, key=lambda part: (-counts[part], part))
    return SyllableTokenizer(ranked[:size], characters, hyphenation_dictionary(language))


@functools.lru_cache(maxsize=4)
def _patterns(dictionary: bytes) -> Hyphenation:
    import pyphen

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, DICTIONARY_FILE)  # pyphen reads nothing but files
        path.write_bytes(dictionary)
        try:
            return Hyphenation(pyphen.Pyphen(filename=path, cache=False))
        except (ValueError, LookupError) as error:
            raise UserError(f"tokenizer syllable: not a hyphenation dictionary ({error})") from None
