"""Each published rule on a text at its limit, which passes, and one step beyond, which does not."""

import pytest

from spikescale.data_pipeline.clean.c4 import c4
from spikescale.data_pipeline.clean.quality import fineweb_measures, gopher_measures, repetition_measures
from spikescale.data_pipeline.clean.rules import RULES, first_broken, limits_of, parse_override
from spikescale.errors import UserError


def words(count: int, length: int = 5, first: int = 0) -> list[str]:
    """Words that differ from each other."""
    return [format(number, "b").replace("0", "a").replace("1", "b").rjust(length, "c")[-length:] for number in
            range(first, first + count)]  # fmt: skip


def text_of(count: int) -> str:
    return " ".join(words(count, 12))


def lines_of(texts: list[str]) -> str:
    return "\n".join(texts)


UNIQUE = [f"{word} stands on a line of its own." for word in words(100, 8)]

# rule: a text that just passes, and one that just does not.
GOPHER = {
    "min_words": (text_of(50), text_of(49)),
    "max_words": ("a " * 100_000, "a " * 100_001),
    "min_word_length": ("abc abc abc abc", "abc abc abc ab"),
    "max_word_length": ("a" * 10 + " " + "b" * 10, "a" * 10 + " " + "b" * 11),
    "hash_ratio": ("# " + "word " * 9, "# " + "word " * 8),
    "ellipsis_ratio": ("word... " + "word " * 9, "word... " + "word " * 8),
    "bullet_lines": (lines_of(["- a"] * 9 + ["b"]), lines_of(["• a"] * 10 + ["b"])),
    "ellipsis_lines": (lines_of(["a ..."] * 3 + ["b"] * 7), lines_of(["a …"] * 4 + ["b"] * 6)),
    "alphabetic_words": ("word " * 8 + "1 2", "word " * 7 + "1 2 3"),
    "stop_words": ("The river, and nothing else", "The river. The river"),
}
FINEWEB = {
    "punctuated_lines": (lines_of(["a."] * 12 + ["b"] * 88), lines_of(["a."] * 11 + ["b"] * 89)),
    "short_lines": (
        lines_of(["b" * 30] * 67 + ["a" * 31] * 33),
        lines_of(["b" * 30] * 68 + ["a" * 31] * 32),
    ),
    # 100 lines of 35 characters, of which 10 or 11 came before.
    "duplicate_line_characters": (lines_of(UNIQUE[:90] + UNIQUE[:10]), lines_of(UNIQUE[:89] + UNIQUE[:11])),
}


def paragraphs(unique: int, repeated: int) -> str:
    return "\n\n".join(UNIQUE[:unique] + UNIQUE[:repeated])


def repeated_run(n: int, total: int, again: int) -> str:
    """`total` words of 9 letters and a space, of which `again` at the end repeat those at the beginning."""
    unique = words(total - again, 9)
    return " ".join(unique + unique[:again]).ljust(total * 10)


REPETITION = {
    "duplicate_paragraphs": (paragraphs(70, 30), paragraphs(69, 31)),
    "duplicate_lines": (lines_of(UNIQUE[:70] + UNIQUE[:30]), lines_of(UNIQUE[:69] + UNIQUE[:31])),
    # The share is of all characters, line ends too: 100 lines of 36 make 35 times 100 plus 99.
    "duplicate_paragraph_characters": (paragraphs(79, 21), paragraphs(78, 22)),
    "duplicate_line_characters": (
        lines_of(UNIQUE[:79] + UNIQUE[:20]),
        lines_of(UNIQUE[:79] + UNIQUE[:21]),
    ),
    # Two occurrences of n words of 9 letters, among as many words as make 0.2 (0.18, 0.16) of the text.
    "top_2_gram": (repeated_run(2, 19, 2), repeated_run(2, 18, 2)),
    "top_3_gram": (repeated_run(3, 33, 3), repeated_run(3, 32, 3)),
    "top_4_gram": (repeated_run(4, 49, 4), repeated_run(4, 48, 4)),
    # n words of 9 letters came before, of as many words of 10 characters as 0.15 (0.14 ...) asks for.
    **{
        f"duplicate_{n}_grams": (repeated_run(n, total, n), repeated_run(n, total - 1, n))
        for n, total in ((5, 30), (6, 39), (7, 49), (8, 60), (9, 74), (10, 90))
    },
}  # fmt: skip
CASES = (
    [("gopher", name, gopher_measures, *texts) for name, texts in GOPHER.items()]
    + [("fineweb", name, fineweb_measures, *texts) for name, texts in FINEWEB.items()]
    + [("gopher-repetition", name, repetition_measures, *texts) for name, texts in REPETITION.items()]
)


@pytest.mark.parametrize(
    ("group", "name", "measures", "passes", "fails"), CASES, ids=lambda value: str(value)[:24]
)
def test_a_rule_lets_its_limit_pass_and_nothing_beyond(group, name, measures, passes, fails) -> None:  # type: ignore[no-untyped-def]
    rule = f"{group}.{name}"
    only = {other: RULES[other].limit if other == rule else None for other in RULES}
    assert first_broken(measures(passes), only) == "", dict(measures(passes))[rule]
    assert first_broken(measures(fails), only) == rule, dict(measures(fails))[rule]


def test_every_rule_has_a_case() -> None:
    covered = {f"{group}.{name}" for group, name, *_ in CASES}
    assert covered == {name for name in RULES if not name.startswith("c4.")}


GOOD = ["This line is a sentence of the text."] * 5


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("It ends as a sentence does.", True),
        ("It ends like nothing much", False),
        ("It trails off ...", False),
        ("Three words here.", True),
        ("Two words.", False),
        ("Please enable Javascript to go on.", False),
        ("This site uses cookies for itself.", False),
        ("Read our privacy policy with care.", False),
    ],
)
def test_c4_removes_lines_and_keeps_the_rest(line: str, kept: bool) -> None:
    text, rule = c4(lines_of([*GOOD, line]), limits_of(()))
    assert rule == "" and text == lines_of([*GOOD, line] if kept else GOOD)


@pytest.mark.parametrize(
    ("passes", "fails", "rule"),
    [
        (GOOD, [*GOOD[:4], "Two words."], "c4.sentences"),
        ([*GOOD, "Ipsum lorem it says."], [*GOOD, "It says lorem ipsum here."], "c4.lorem_ipsum"),
        ([*GOOD, "It has [square] brackets."], [*GOOD, "It has {curly} brackets."], "c4.curly_bracket"),
    ],
)
def test_c4_drops_documents(passes: list[str], fails: list[str], rule: str) -> None:
    assert c4(lines_of(passes), limits_of(())) == (lines_of(passes), "")
    assert c4(lines_of(fails), limits_of(()))[1] == rule
    assert c4(lines_of(fails), limits_of([(rule, None)]))[1] == ""


def test_limits_can_be_changed_and_mistakes_are_said() -> None:
    assert parse_override("gopher.min_words=12") == ("gopher.min_words", 12.0)
    assert parse_override("c4.javascript=off") == ("c4.javascript", None)
    limits = limits_of([parse_override("gopher.min_words=3")])
    assert first_broken(gopher_measures("The words and"), {**limits, "gopher.stop_words": None}) == ""
    for wrong, message in (
        ("gopher.minwords=3", "must be one of gopher-repetition.duplicate_paragraphs"),
        ("gopher.min_words", "write gopher.min_words=NUMBER"),
        ("gopher.min_words=-1", "at least 0"),
        ("gopher.min_words=nan", "at least 0"),
        ("c4.javascript=2", "1 \\(on\\) or off"),
    ):
        with pytest.raises(UserError, match=message):
            parse_override(wrong)
