"""Questions by rules: definitions ("X is a ..."), and gaps where a number or a name was."""

import re
from collections.abc import Iterator

GAP = "____"
LONGEST = 128  # characters of a question with a gap
FEWEST_WORDS = 6  # of a sentence with a gap
# A full stop after one letter, or after these, ends no sentence.
_SENTENCE = re.compile(
    r"[^\s=][^\n]*?(?<!\b[A-Z])(?<!\b(?:Mr|Dr|St|No|Co))(?<!\b(?:Mrs|Gen|Col|Jan|Feb|Mar|Apr|Aug|Oct|Nov|Dec))"
    r"(?<!\b(?:Capt|Sept))[.!?](?=[\"')\]]*(?:\s|$))"
)
_DEFINITION = re.compile(
    r"(?P<subject>(?:(?:The|A|An) )?[A-Z][\w'’-]*(?: [\w'’-]+){0,5}?) (?P<verb>is|are|was|were) "
    r"(?P<answer>(?:a|an|the|one of) [^.,;:()!?]{6,}?)(?=[.,;:!?]| that | which | who | whose | where )"
)
_GAPS = (
    re.compile(r"(?<![\w.,-])\d[\d,.]*\d(?![\w-])"),  # numbers of two digits and more, years among them
    re.compile(
        r"(?<=[a-z,] )[A-Z][\w'’-]{3,}(?: (?:of |the |de )?[A-Z][\w'’-]+)*"
    ),  # names within a sentence
    re.compile(r"\b[a-z]{9,}\b"),
)
# Words that begin a sentence without beginning the name of its subject.
_BEGINNINGS = """
A After All Also Although And Another Any As At Because Before Both But By Each Either Even Every For From
He Her Here His How However I If In It Its Many More Most My Neither No Nor Not Now Of On One Only Or Other
Our Ours She Since So Some Such That Then There Therefore These They This Those Though Thus To Under Until
Upon We What When Where Whether Which While Who Whose Why With You Your Yet
"""
_NO_NAMES = frozenset(_BEGINNINGS.split())


def extract(title: str, section: str, count: int) -> list[tuple[str, str]]:
    """Up to `count` pairs: definitions first, then gaps, at most one of a sentence, in the text's order.

    `title`, where there is one, says in front of a gap what the sentence is about.
    """
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
    if first in ("The", "A", "An") and rest:
        subject = f"{first.lower()} {rest}"
    elif first in _NO_NAMES:
        return
    yield f"What {match['verb']} {subject}?", answer


def _gaps(title: str, sentence: str) -> Iterator[tuple[str, str]]:
    if len(sentence.split()) < FEWEST_WORDS:
        return
    about = f"{title}: " if title else ""
    shown = max(40, LONGEST - len(about) - len(GAP) - 2 * len("... "))
    for pattern in _GAPS:
        for match in pattern.finditer(sentence):
            left, right = _shown(sentence, *match.span(), shown)
            question = f"{about}{left}{GAP}{right}"
            if match[0] not in question:
                yield question, match[0]


def _shown(sentence: str, begin: int, end: int, shown: int) -> tuple[str, str]:
    """What stands before and after, cut at words where that is longer than `shown` characters."""
    left, right = sentence[:begin], sentence[end:]
    if len(left) + len(right) <= shown:
        return left, right
    room = max(shown // 2, shown - len(right)), max(shown // 2, shown - len(left))
    if len(left) > room[0]:
        left = "... " + left[-room[0] :].partition(" ")[2]
    if len(right) > room[1]:
        right = right[: room[1]].rpartition(" ")[0] + " ..."
    return left, right
