"""Cutting an article into a few consecutive sections."""

import itertools
import re
from typing import NamedTuple

_PARAGRAPH_END = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+")
_SPACE = re.compile(r"\s+")


class Section(NamedTuple):
    """Consecutive text of an article, and where in the article it starts (in characters)."""

    number: int
    start: int
    text: str


def sections(text: str, count: int) -> list[Section]:
    """`text` in at most `count` consecutive sections of about the same length that together are the text.

    A cut falls at the paragraph end nearest to the ideal place if one is within a quarter of a
    section, else at the nearest sentence end, else at the nearest space; blank sections are left out.
    """
    paragraphs, sentences, spaces = (
        [match.end() for match in pattern.finditer(text)]
        for pattern in (_PARAGRAPH_END, _SENTENCE_END, _SPACE)
    )
    bounds = [0]
    for number in range(1, count):
        ideal = len(text) * number // count
        near = [end for end in paragraphs if abs(end - ideal) <= len(text) / count / 4]
        for ends in (near, sentences, spaces):
            later = [end for end in ends if bounds[-1] < end < len(text)]
            if later:
                bounds.append(min(later, key=lambda end: abs(end - ideal)))
                break
    bounds.append(len(text))
    pieces = [text[begin:end] for begin, end in itertools.pairwise(bounds)]
    return [
        Section(number, begin, piece)
        for number, (begin, piece) in enumerate(zip(bounds, pieces, strict=False))
        if piece.strip()
    ]
