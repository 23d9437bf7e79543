"""Quality heuristics of Gopher and FineWeb: what each rule measures.

Words are what stands between white space. Where the papers leave something open (whether
repetitions are counted from the first or the second occurrence, and what characters are compared
with), the second occurrence and all characters of the text are meant, as in datatrove, by which
FineWeb was made.
"""

import re
from collections.abc import Iterator

import numpy as np

from spikescale.data_pipeline.clean.words import ngram_hashes, word_hashes

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
SHORT_LINE = 30
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")
_OUTER_PUNCTUATION = re.compile(r"^\W+|\W+$")
_BULLETS = ("•", "‣", "◦", "·", "*", "-", "–")
_ELLIPSES = ("...", "…")
# Of Latin, Arabic, Devanagari, CJK and Armenian sentences, closing quotation marks included.
TERMINAL = tuple(".!?…\"'”’。！？؟۔।॥։")


def gopher_measures(text: str) -> Iterator[tuple[str, float]]:
    """The values of Gopher's document rules, in the order in which they are applied."""
    tokens = text.split()
    words = [word for word in (_OUTER_PUNCTUATION.sub("", token) for token in tokens) if word]
    yield "gopher.min_words", len(words)
    yield "gopher.max_words", len(words)
    mean = sum(map(len, words)) / max(1, len(words))
    yield "gopher.min_word_length", mean
    yield "gopher.max_word_length", mean
    count = max(1, len(tokens))
    yield "gopher.hash_ratio", text.count("#") / count
    yield "gopher.ellipsis_ratio", sum(text.count(mark) for mark in _ELLIPSES) / count
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    total = max(1, len(lines))
    yield "gopher.bullet_lines", sum(line.startswith(_BULLETS) for line in lines) / total
    yield "gopher.ellipsis_lines", sum(line.endswith(_ELLIPSES) for line in lines) / total
    letters = sum(any(map(str.isalpha, token)) for token in tokens)
    yield "gopher.alphabetic_words", letters / count
    yield "gopher.stop_words", len(STOP_WORDS.intersection(word.lower() for word in words))


def repetition_measures(text: str) -> Iterator[tuple[str, float]]:
    """The values of Gopher's repetition rules, in the order in which they are applied."""
    group = "gopher-repetition"
    size = max(1, len(text))
    pieces = [piece for piece in _PARAGRAPH_END.split(text.strip()) if piece]
    repeated, characters = repetitions(pieces)
    yield f"{group}.duplicate_paragraphs", repeated / max(1, len(pieces))
    yield f"{group}.duplicate_paragraph_characters", characters / size
    lines = [line for line in text.split("\n") if line.strip()]
    repeated, characters = repetitions(lines)
    yield f"{group}.duplicate_lines", repeated / max(1, len(lines))
    yield f"{group}.duplicate_line_characters", characters / size
    words = text.split()
    hashes = word_hashes(words)
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for n in (2, 3, 4):
        yield f"{group}.top_{n}_gram", _top_characters(ngram_hashes(hashes, n), starts, n) / size
    for n in range(5, 11):
        yield f"{group}.duplicate_{n}_grams", _repeated_characters(ngram_hashes(hashes, n), lengths, n) / size


def fineweb_measures(text: str) -> Iterator[tuple[str, float]]:
    """The values of FineWeb's own rules, in the order in which they are applied."""
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    total = max(1, len(lines))
    yield "fineweb.punctuated_lines", sum(line.endswith(TERMINAL) for line in lines) / total
    yield "fineweb.short_lines", sum(len(line) <= SHORT_LINE for line in lines) / total
    size = max(1, len(text) - text.count("\n"))
    yield "fineweb.duplicate_line_characters", repetitions(lines)[1] / size


def repetitions(pieces: list[str]) -> tuple[int, int]:
    """How many pieces equal an earlier one, and how many characters these have."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count += 1
            characters += len(piece)
        seen.add(piece)
    return count, characters


def _top_characters(grams: np.ndarray, starts: np.ndarray, n: int) -> int:
    """Characters, spaces between words included, of the most frequent n-gram; 0 when none repeats."""
    if not len(grams):
        return 0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    most = int(counts.max())
    if most < 2:
        return 0
    position = int(first[counts == most].min())
    return most * (int(starts[position + n] - starts[position]) + n - 1)


def _repeated_characters(grams: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters of the words that lie in an n-gram which came before; each word counts once."""
    if not len(grams):
        return 0
    repeated = np.ones(len(grams), dtype=bool)
    repeated[np.unique(grams, return_index=True)[1]] = False
    steps = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.add.at(steps, np.flatnonzero(repeated), 1)
    np.add.at(steps, np.flatnonzero(repeated) + n, -1)
    return int(lengths[np.cumsum(steps[:-1]) > 0].sum())
