"""Words, and hashes of words and of runs of words, for whatever compares texts."""

import hashlib
import re
import unicodedata

import numpy as np

# Scripts that put no spaces between words (Thai to Lao, Burmese, Khmer, kana, Han): a character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_CACHE_WORDS = 1 << 18
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

_word_hashes: dict[str, int] = {}


def normal_words(text: str) -> list[str]:
    """The words of a text without case, punctuation and compatibility forms (NFKC)."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def normal_digest(text: str) -> bytes:
    """16 bytes that are equal for texts with equal words; a text without words counts as it is."""
    words = normal_words(text)
    content = " ".join(words) if words else "\0" + " ".join(text.split())
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def word_hashes(words: list[str]) -> np.ndarray:
    """A 64-bit hash of each word, uint64."""
    if len(_word_hashes) > _CACHE_WORDS:
        _word_hashes.clear()
    known = _word_hashes
    hashes = np.empty(len(words), dtype=np.uint64)
    for position, word in enumerate(words):
        value = known.get(word)
        if value is None:
            encoded = word.encode("utf-8", "surrogatepass")
            value = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
            known[word] = value
        hashes[position] = value
    return hashes


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of every n consecutive words, uint64, in their order; none when there are fewer."""
    count = len(hashes) - n + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    combined = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        combined = combined * _MULTIPLIER + hashes[offset : offset + count]
        combined ^= combined >> np.uint64(29)
    return combined
