"""Questions by rules: definitions ("X is a ..."), and gaps where a number or a name was."""

import re
from collections.abc import Iterator

GAP = "____"
SHOWN = 96  # characters around a gap
_SENTENCE = re.compile(r"[^\s=][^\n]*?[.!?](?=[\"')\]]*(?:\s|$))")
_DEFINITION = re.compile(
    r"(?P<subject>(?:(?:The|A|An) )?[A-Z][\w'’-]*(?: [\w'’-]+){0,5}?) (?P<verb>is|are|was|were) "
    r"(?P<answer>(?:a|an|the|one of) [^.,;:()!?]{6,}?)(?=[.,;:!?]| that | which | who | whose | where )"
)
_GAPS = (
    re.compile(r"(?<![\w.,-])\d[\d,.]*\d(?![\w-])"),  # numbers of two digits and more, years among them
    re.compile(r"(?<=[a-z,] )[A-Z][\w'’-]+(?: (?:of |the |de )?[A-Z][\w'’-]+)*"),  # names within a sentence
    re.compile(r"\b[a-z]{9,}\b"),
)
_PRONOUNS = {"He", "She", "It", "They", "This", "That", "These", "Those", "There", "We", "I", "You", "One"}


def extract(title: str, section: str, count: int) -> list[tuple[str, str]]:
    """Up to `count` pairs: definitions first, then gaps, at most one of a sentence, in the text's order."""
    found = [match[0] for match in _SENTENCE.finditer(section)]
    pairs: list[tuple[str, str]] = []
    used: set[str] = set()
    for make in (_definitions, _gaps):
        for sentence in found:
            if len(pairs) == count:
                return pairs
            if sentence in used:
                continue
            pair = next(make(title, sentence), None)
            if pair is not None:
                pairs.append(pair)
                used.add(sentence)
    return pairs


def _definitions(title: str, sentence: str) -> Iterator[tuple[str, str]]:
    match = _DEFINITION.match(sentence)
    if match is None:
        return
    subject, answer = match["subject"], match["answer"].rstrip()
    first, _, rest = subject.partition(" ")
    if first in _PRONOUNS:
        return
    if first in ("The", "A", "An"):
        subject = f"{first.lower()} {rest}"
    yield f"What {match['verb']} {subject}?", answer


def _gaps(title: str, sentence: str) -> Iterator[tuple[str, str]]:
    for pattern in _GAPS:
        for match in pattern.finditer(sentence):
            left, right = _shown(sentence, *match.span())
            if match[0] not in left + right:
                yield f"{title}: {left}{GAP}{right}", match[0]


def _shown(sentence: str, begin: int, end: int) -> tuple[str, str]:
    """What stands before and after, cut at words where the sentence is long."""
    left, right = sentence[:begin], sentence[end:]
    if len(left) + len(right) <= SHOWN:
        return left, right
    room = max(SHOWN // 2, SHOWN - len(right)), max(SHOWN // 2, SHOWN - len(left))
    if len(left) > room[0]:
        left = "... " + left[-room[0] :].partition(" ")[2]
    if len(right) > room[1]:
        right = right[: room[1]].rpartition(" ")[0] + " ..."
    return left, right
