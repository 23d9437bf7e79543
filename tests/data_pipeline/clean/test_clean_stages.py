"""Repair, language, length, word lists, personal data and evaluation sets, a document at a time."""

import json
from pathlib import Path

import pytest

from spikescale.data_pipeline.clean.contamination import load_index, write_index
from spikescale.data_pipeline.clean.record import Record, length_bin, read_record
from spikescale.data_pipeline.clean.scrub import scrub
from spikescale.data_pipeline.clean.settings import CleanSettings
from spikescale.data_pipeline.clean.stages import Verdict, make_stages
from spikescale.data_pipeline.clean.words import normal_digest, normal_words
from spikescale.errors import UserError

ENGLISH = "The committee met in the morning and decided that the bridge over the river should be repaired. "
GERMAN = "Der Ausschuss tagte am Morgen und beschloss, dass die Brücke über den Fluss repariert werden soll. "


def only(settings: CleanSettings, text: str) -> Verdict:
    (stage,) = make_stages(settings, None)
    return stage.apply(text)


@pytest.mark.parametrize(
    ("broken", "repaired"),
    [
        ("naÃ¯ve cafÃ©", "naïve café"),
        ("e\u0301tude", "étude"),
        ("it\x00 is\x07 here\r\nnow", "it is here\nnow"),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        ("“curly” ﬁne ＡＢ", "“curly” ﬁne ＡＢ"),
    ],
)
def test_unicode_is_repaired_and_composed_but_typography_stays(broken: str, repaired: str) -> None:
    assert only(CleanSettings(fix_unicode=True), broken) == Verdict(repaired)
    assert only(CleanSettings(fix_unicode=True), repaired).text == repaired


def test_lengths_are_inclusive() -> None:
    settings = CleanSettings(min_characters=3, max_characters=5)
    rules = [only(settings, "é" * length).rule for length in range(2, 7)]
    assert rules == ["length.min_characters", "", "", "", "length.max_characters"]


def test_the_language_filter_keeps_what_it_was_told_to() -> None:
    english = CleanSettings(languages=("en",))
    assert only(english, ENGLISH) == Verdict(ENGLISH, "", "en")
    assert only(english, GERMAN) == Verdict(GERMAN, "language.other", "de")
    assert only(CleanSettings(languages=("de", "en")), GERMAN).rule == ""
    assert only(CleanSettings(languages=("en",), language_score=1.0), "To be 12").rule != ""
    with pytest.raises(UserError, match=r"language 'xx': must be one of .*, af, "):
        make_stages(CleanSettings(languages=("xx",)), None)


def test_word_lists_count_whole_words_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# a list\nspam\nGreen  Eggs # a phrase\n\n")
    settings = CleanSettings(adult_words=str(path), adult_limit=1)
    assert only(settings, "Spam and spammers, antispam").rule == ""
    assert only(settings, "Spam and green\neggs").rule == "adult"
    assert only(CleanSettings(adult_words="builtin"), "a porn site").rule == "adult"
    assert only(CleanSettings(adult_words="builtin"), "popcorn sites").rule == ""
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match=r"words.txt: holds no words"):
        make_stages(settings, None)


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("Write to jane.doe+news@mail.example.co.uk.", "Write to [EMAIL]."),
        ("user@localhost and a@b", "user@localhost and a@b"),
        ("ping 8.8.8.8, not 192.168.0.1 or 300.1.1.1", "ping [IP], not 192.168.0.1 or 300.1.1.1"),
        ("version 1.2.3.4.5 and 3.1.4", "version 1.2.3.4.5 and 3.1.4"),
        ("at 2606:4700::1111 or ::1 at 10:15:30", "at [IP] or ::1 at 10:15:30"),
        ("Call +49 170 1234567 or (415) 555-2671.", "Call [PHONE] or [PHONE]."),
        ("1-800-555-0199; 415.555.2671", "[PHONE]; [PHONE]"),
        ("in 1914-1918, ISBN 978-3-16-148410-0, 3 + 4", "in 1914-1918, ISBN 978-3-16-148410-0, 3 + 4"),
        ("+1 2 and +12345", "+1 2 and +12345"),
    ],
)
def test_personal_data_with_a_form_is_replaced(text: str, scrubbed: str) -> None:
    assert scrub(text) == scrubbed
    assert scrub(scrubbed) == scrubbed


@pytest.mark.timeout(120)
def test_scrubbing_takes_linear_time_on_hostile_text() -> None:
    """A quadratic pattern would take hours on these."""
    for text in (
        "a" * 2_000_000 + "@",
        "1." * 500_000,
        ":" * 500_000,
        "+1 " * 300_000,
        "+1234567890123456789012345678901x" * 30_000,
        "1." * 9 + "(123" * 99_999,
        "a@" * 300_000,
    ):
        assert scrub(text).count("]") == 0


SENTENCE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def test_a_shared_run_of_thirteen_words_is_contamination_and_twelve_are_not(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    short = "Red, green and blue are the colours here"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (SENTENCE, short, "too short")))
    index = load_index(tmp_path / "i.npz", write_index([str(path)], 13, tmp_path / "i.npz"))
    words = SENTENCE.split()
    shared = "Before it: " + ", ".join(words[1:14]).upper() + " and after it."
    assert index.overlap("Before it: " + " ".join(words[1:13]) + " and after it.") == 0
    assert index.overlap(shared) == pytest.approx(1 / (13 + 5 - 12))
    assert index.overlap("Well: red green and blue ARE the colours here!") > 0
    assert index.overlap("much too short") == index.overlap("") == 0
    for overlap, rule in ((0.0, "evaluation"), (1 / 6, ""), (0.16, "evaluation")):
        settings = CleanSettings(evaluation_sets=(str(path),), evaluation_overlap=overlap)
        (stage,) = make_stages(settings, index)
        assert stage.apply(shared).rule == rule


def test_words_are_compared_without_case_punctuation_and_forms() -> None:
    assert normal_words("It’s ＡＢＣ—Straße, 你好!") == ["it", "s", "abc", "strasse", "你", "好"]
    assert normal_digest("Hello, world") == normal_digest("  hello\nWORLD!!") != normal_digest("hello word")
    assert normal_digest("!?") == normal_digest(" !?\n") != normal_digest("?!")


def test_a_record_keeps_the_samples_of_smallest_hash_whatever_the_order(tmp_path: Path) -> None:
    contents = []
    for step in (1, -1):
        record = Record({"request": "r"})
        record.begin_stage("length")
        for number in range(40)[::step]:
            record.dropped(
                "length", "length.min_characters", f"text {number}", f"/somewhere/a.txt, line {number}"
            )
        contents.append(record.content())
    assert contents[0] == contents[1]
    samples = contents[0]["samples"]["length.min_characters"]
    assert len(samples) == 3 and samples[0]["place"].startswith("a.txt, line ")
    assert contents[0]["stages"][0]["dropped"] == {
        "length.min_characters": {"documents": 40, "characters": sum(len(f"text {n}") for n in range(40))}
    }
    path = tmp_path / "record.json"
    record.write(path)
    assert read_record(path, "r") == contents[0] and read_record(path, "other") is None
    path.write_text(path.read_text().replace('"documents": 40', '"documents": 41'))
    assert read_record(path, "r") is None


def test_bins_of_lengths_are_quarters_of_octaves() -> None:
    for length in (1, 2, 3, 100, 1023, 1024, 10**9):
        number = length_bin(length)
        assert 2 ** (number / 4) <= length * (1 + 1e-12) and length < 2 ** ((number + 1) / 4)


def test_settings_that_mean_nothing_are_refused() -> None:
    for given, message in (
        ({"min_characters": 9, "max_characters": 8}, "at most max_characters = 8"),
        ({"max_characters": 0}, "max_characters = 0: must be at least 1"),
        ({"language_score": 1.5}, "language_score = 1.5: must be 0 to 1"),
        ({"duplicates": "some"}, "must be one of off, exact, normalised"),
        ({"quality": ("golfer",)}, "must be one of gopher-repetition, gopher, c4, fineweb"),
        ({"rules": (("gopher.min_words", 3.0),)}, "its group 'gopher' is not chosen"),
    ):
        with pytest.raises(UserError, match=message):
            CleanSettings(**given)  # type: ignore[arg-type]
    assert not CleanSettings(near_bands=3, adult_limit=4).active
