"""The syllable tokenizer: which ids words become, and that it is the same however the corpus is cut."""

import json
from collections import Counter
from pathlib import Path

import pytest

from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import open_source
from spikescale.data_pipeline.tokenizers import load_tokenizer, make_tokenizer, parse_spec
from spikescale.data_pipeline.tokenizers.syllable import (
    SyllableTokenizer,
    count_syllables,
    hyphenation_dictionary,
)
from spikescale.errors import UserError

ENGLISH = hyphenation_dictionary("en_US")


def pieces(tokenizer: SyllableTokenizer, text: str) -> list[bytes]:
    return [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode(text)]


def test_words_become_syllables_then_characters_then_bytes() -> None:
    tokenizer = SyllableTokenizer([" gov", "ern", "ment"], " govermnt", ENGLISH)
    assert pieces(tokenizer, " government") == [b" gov", b"ern", b"ment"]
    # "gov" is unknown without its space, " ern" with it.
    assert pieces(tokenizer, "government ern") == [b"g", b"o", b"v", b"ern", b"ment", b" ", b"ern"]
    assert pieces(tokenizer, "\u00e9") == [b"\xc3", b"\xa9"]
    # Case is kept: the syllable in capitals is another one, and so are its letters.
    assert tokenizer.decode(tokenizer.encode(" GOVERNMENT")) == " GOVERNMENT"
    assert tokenizer.encode(" government") == [0, 1, 2]
    assert tokenizer.vocab_size == 3 + len(set(" govermnt")) + 256 + 1
    assert tokenizer.eos_id == tokenizer.vocab_size - 1


@pytest.mark.parametrize(
    "text",
    ["\u0130stanbul \u1e9e Stra\u00dfe", "x" * 500, "Zucker Schiffahrt", "don't re-enter", "\u0301a\u200d"],
)
def test_unusual_words_survive(text: str) -> None:
    for language in ("en_US", "de_DE"):
        counts = count_syllables([text], language)
        tokenizer = make_tokenizer(f"syllable:50:{language}", characters=text, syllables=counts)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not any(tokenizer.token_bytes(i) == b"x" * 500 for i in range(tokenizer.vocab_size))


def test_counts_of_parts_add_up_and_rank_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the nation of the nation", " the national energy", "energy"]
    whole = count_syllables(texts, "en_US")
    assert whole == {
        **{"the": 1, " the": 2, " of": 1},
        **{" na": 3, "tion": 3, "al": 1},
        **{" en": 1, "en": 1, "er": 2, "gy": 2},
    }
    parts: Counter[str] = Counter()
    for text in texts:
        parts.update(count_syllables([text], "en_US"))
    assert parts == whole
    monkeypatch.setattr("spikescale.data_pipeline.tokenizers.syllable.CACHED_WORDS", 1)
    assert count_syllables(texts, "en_US") == whole
    tokenizer = make_tokenizer("syllable:2", characters="thena", syllables=whole)
    assert [tokenizer.token_bytes(number) for number in range(2)] == [b" na", b"tion"]


def test_equally_common_syllables_rank_by_their_letters() -> None:
    one = make_tokenizer("syllable:2", characters="x", syllables={"bb": 1, "aa": 1, "cc": 1})
    two = make_tokenizer("syllable:2", characters="x", syllables={"cc": 1, "aa": 1, "bb": 1})
    assert one.sha256 == two.sha256 and [one.token_bytes(0), one.token_bytes(1)] == [b"aa", b"bb"]


def test_preparing_learns_the_same_syllables_however_the_corpus_is_cut(
    tmp_path: Path, jsonl: Path, texts: list[str]
) -> None:
    made: list[Manifest] = []
    for parts in (1, 3, 7):
        source = open_source([str(jsonl)], partition_bytes=jsonl.stat().st_size // parts + 1)
        settings = PrepareSettings(tokenizer="syllable:40", ray=False, quiet=True)
        made.append(prepare(source, tmp_path / str(parts), settings))
        assert made[-1].partitions == parts
    assert made[0].tokenizer == made[1].tokenizer == made[2].tokenizer
    assert made[0].tokenizer.kind == "syllable"
    tokens = [manifest.totals("train").tokens for manifest in made]
    assert len(set(tokens)) == 1 and tokens[0] < 0.8 * made[0].totals("train").characters
    learnt = load_tokenizer(made[0].tokenizer_folder)
    # Of the training split alone: syllables of other documents would show in the counts.
    settings = PrepareSettings().split
    import hashlib

    from spikescale.data_pipeline.split import split_of

    train = [t for t in texts if split_of(hashlib.sha256(t.encode()).digest(), settings) == "train"]
    expected = make_tokenizer(
        "syllable:40", characters="".join(train), syllables=count_syllables(train, "en_US")
    )
    assert learnt.sha256 == expected.sha256


def test_the_dictionary_travels_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = SyllableTokenizer([" gov", "ern"], "a", b"UTF-8\n.a1b\nb1c\n")
    assert tokenizer.encode(" abc") != SyllableTokenizer([" gov", "ern"], "a", ENGLISH).encode("x")
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.files["hyphenation.dic"] == b"UTF-8\n.a1b\nb1c\n"
    assert loaded.sha256 == tokenizer.sha256
    assert SyllableTokenizer([" gov", "ern"], "a", ENGLISH).sha256 != tokenizer.sha256


def test_bad_specifications_and_vocabularies_are_refused() -> None:
    assert parse_spec("syllable").size == 2000
    assert parse_spec("syllable:500:de_DE").language == "de_DE"
    for spec, words in (
        ("syllable:", "write syllable"),
        ("syllable:0", "write syllable"),
        ("syllable:many", "write syllable"),
        ("syllable:5:xx_XX", "no hyphenation of language 'xx_XX'; there are .*en_US"),
    ):
        with pytest.raises(UserError, match=words):
            parse_spec(spec)
    with pytest.raises(UserError, match="occurs twice"):
        SyllableTokenizer(["ab", "ab"], "", ENGLISH)
    with pytest.raises(UserError, match="occurs twice, or is a single character"):
        SyllableTokenizer(["a"], "a", ENGLISH)


def test_an_empty_training_split_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": ""}) + "\n")
    with pytest.raises(UserError, match="has no documents to learn from"):
        prepare(
            open_source([str(path)]),
            tmp_path / "out",
            PrepareSettings(tokenizer="syllable", ray=False, quiet=True),
        )
