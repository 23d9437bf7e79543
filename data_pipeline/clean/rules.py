"""The published quality rules: their names, limits and sources, and how a user changes a limit.

Sources
    Gopher      Rae et al. 2021, arXiv:2112.11446, appendix A.1.1 and table A1
    C4          Raffel et al. 2020, JMLR 21(140), section 2.2
    FineWeb     Penedo et al. 2024, arXiv:2406.17557, section 3.6
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from spikescale.errors import UserError

GROUPS = ("gopher-repetition", "gopher", "c4", "fineweb")  # in the order in which they run


class Rule(NamedTuple):
    """A rule: what it measures, on which side of the limit a document is dropped, and who published it.

    Attributes:
        kind: `min` (dropped when below the limit), `max` (dropped when above), `flag` (1 is on).
    """

    kind: str
    limit: float
    meaning: str


RULES: dict[str, Rule] = {
    "gopher-repetition.duplicate_paragraphs": Rule("max", 0.30, "share of paragraphs that came before"),
    "gopher-repetition.duplicate_paragraph_characters": Rule(
        "max", 0.20, "share of characters in such paragraphs"
    ),
    "gopher-repetition.duplicate_lines": Rule("max", 0.30, "share of lines that came before"),
    "gopher-repetition.duplicate_line_characters": Rule("max", 0.20, "share of characters in such lines"),
    **{
        f"gopher-repetition.top_{n}_gram": Rule(
            "max", limit, f"share of characters in the most frequent {n} words"
        )
        for n, limit in ((2, 0.20), (3, 0.18), (4, 0.16))
    },
    **{
        f"gopher-repetition.duplicate_{n}_grams": Rule(
            "max", limit, f"share of characters in {n} words that came before"
        )
        for n, limit in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    },
    "gopher.min_words": Rule("min", 50, "words"),
    "gopher.max_words": Rule("max", 100_000, "words"),
    "gopher.min_word_length": Rule("min", 3, "mean characters of a word"),
    "gopher.max_word_length": Rule("max", 10, "mean characters of a word"),
    "gopher.hash_ratio": Rule("max", 0.1, "hash signs to words"),
    "gopher.ellipsis_ratio": Rule("max", 0.1, "ellipses to words"),
    "gopher.bullet_lines": Rule("max", 0.9, "share of lines that begin with a bullet"),
    "gopher.ellipsis_lines": Rule("max", 0.3, "share of lines that end in an ellipsis"),
    "gopher.alphabetic_words": Rule("min", 0.8, "share of words with a letter"),
    "gopher.stop_words": Rule("min", 2, "different words of: the, be, to, of, and, that, have, with"),
    "c4.terminal_punctuation": Rule("flag", 1, "removes lines that do not end in . ! ? or a quotation mark"),
    "c4.line_words": Rule("min", 3, "words of a line; shorter lines are removed"),
    "c4.javascript": Rule("flag", 1, "removes lines with the word javascript"),
    "c4.policy": Rule("flag", 1, "removes lines about cookies, privacy policies and terms of use"),
    "c4.lorem_ipsum": Rule("flag", 1, "drops documents with lorem ipsum"),
    "c4.curly_bracket": Rule("flag", 1, "drops documents with a curly bracket"),
    "c4.sentences": Rule("min", 5, "sentences that are left"),
    "fineweb.punctuated_lines": Rule("min", 0.12, "share of lines that end in punctuation"),
    "fineweb.short_lines": Rule("max", 0.67, "share of lines of at most 30 characters"),
    "fineweb.duplicate_line_characters": Rule("max", 0.1, "share of characters in lines that came before"),
}

Limits = Mapping[str, float | None]  # of every rule; None: off


def parse_override(text: str) -> tuple[str, float | None]:
    """`NAME=NUMBER` or `NAME=off` as a pair. Raises UserError for an unknown rule or another value."""
    name, separator, value = text.partition("=")
    if name not in RULES:
        raise UserError(f"quality rule {name!r}: must be one of {', '.join(RULES)}")
    if value == "off":
        return name, None
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not separator or not 0 <= number < float("inf"):
        raise UserError(f"quality rule {text!r}: write {name}=NUMBER, at least 0, or {name}=off")
    if RULES[name].kind == "flag" and number != 1:
        raise UserError(f"quality rule {text!r}: it is 1 (on) or off")
    return name, number


def limits_of(overrides: Iterable[tuple[str, float | None]]) -> dict[str, float | None]:
    """The limits of all rules, the published ones where `overrides` say nothing."""
    return {**{name: rule.limit for name, rule in RULES.items()}, **dict(overrides)}


def first_broken(measured: Iterable[tuple[str, float]], limits: Limits) -> str:
    """The name of the first rule whose measured value is beyond its limit, else an empty string.

    `measured` may be a generator: what comes after the broken rule is not computed.
    """
    for name, value in measured:
        limit = limits[name]
        if limit is None:
            continue
        if value < limit if RULES[name].kind == "min" else value > limit:
            return name
    return ""
