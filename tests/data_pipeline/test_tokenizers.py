"""Tokenizers: exact ids and bytes, fingerprints, streaming decoders, the checked fast path."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from spikescale.data_pipeline.tokenizers import Tokenizer, load_tokenizer, make_tokenizer, parse_spec
from spikescale.data_pipeline.tokenizers.byte import ByteTokenizer
from spikescale.data_pipeline.tokenizers.conditioned import ConditionedTokenizer
from spikescale.data_pipeline.tokenizers.huggingface import HuggingFaceTokenizer, gpt2_tokenizer_json
from spikescale.data_pipeline.tokenizers.syllable import count_syllables
from spikescale.errors import UserError

HARD = [
    "",
    "plain ASCII",
    "naïve café e\u0301 \U0001f469\u200d\U0001f52c 你好 \u0000\u0007\ufeff",
    "  spaces   and\ttabs\n\n\r\n ",
    "<|endoftext|> a<|endoftext|>b <|pad|><|endoftext|",
    "</s><s><unk><eos>",
]
POOL = [*"abc XYZ\n\t<|>é你🙂\u0301", "<|endoftext|>", "<|pad|>", "the ", "  "]


def fuzz(count: int) -> list[str]:
    chooser = random.Random(5)
    return ["".join(chooser.choices(POOL, k=chooser.randrange(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe(texts: list[str]) -> HuggingFaceTokenizer:
    """A byte-level BPE like GPT-2's, trained here, with special and ordinary added tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.add_tokens(["   "])
    made.enable_truncation(5)  # which must not be applied
    return HuggingFaceTokenizer(made.to_str().encode())


@pytest.fixture(scope="module")
def spaced(texts: list[str]) -> HuggingFaceTokenizer:
    """A unigram model with Metaspace: a token's text depends on where it stands."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(made.to_str().encode())


@pytest.fixture(scope="module")
def sentence_piece(texts: list[str]) -> Tokenizer:
    return make_tokenizer("sentencepiece:360:unigram", texts=texts)


@pytest.fixture(scope="module")
def syllable(texts: list[str]) -> Tokenizer:
    """Characters of the texts alone: those of HARD and POOL beyond them must go by bytes."""
    counts = count_syllables(texts, "en_US")
    return make_tokenizer("syllable:60", characters="".join(texts), syllables=counts)


@pytest.fixture(scope="module")
def conditioned_bpe(bpe: HuggingFaceTokenizer) -> Tokenizer:
    return ConditionedTokenizer(bpe, {"category": ["physics", "art"], "source": ["<|endoftext|>"]}, 0.1)


ALL = ["byte", "char", "bpe", "sentence_piece", "spaced", "syllable", "conditioned_bpe"]


@pytest.fixture(params=ALL)
def tokenizer(request: pytest.FixtureRequest, texts: list[str]) -> Tokenizer:
    if request.param == "byte":
        return make_tokenizer("byte")
    if request.param == "char":
        return make_tokenizer("char", characters="".join([*texts, *HARD, *POOL]))
    made: Tokenizer = request.getfixturevalue(request.param)
    return made


def test_ids_are_in_range_and_never_the_end_of_a_document(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in [*HARD, *texts[:50], *fuzz(200)]:
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids
        assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
        assert tokenizer.encode_arrays([text])[0].tolist() == ids
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.eos_id]) == ""


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "spaced"])
def test_every_text_survives_encoding_and_decoding(
    kind: str, request: pytest.FixtureRequest, texts: list[str]
) -> None:
    if kind == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    elif kind == "char":
        tokenizer = make_tokenizer("char", characters="".join([*texts, *HARD, *POOL]))
    else:
        tokenizer = request.getfixturevalue(kind)
    for text in [*HARD, *texts[:50], *fuzz(200)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_the_stream_decoder_emits_whole_characters_that_add_up_to_decode(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    for text in [*HARD, *texts[:50], *fuzz(100)]:
        ids = tokenizer.encode(text)
        decoder = tokenizer.stream_decoder()
        pushed = [decoder.push(token_id) for token_id in ids]
        assert "".join(pushed) + decoder.finish() == tokenizer.decode(ids)
        if tokenizer.kind == "byte":
            assert not any("\ufffd" in part for part in pushed)
    # An end that breaks off within a character becomes one replacement character.
    if tokenizer.kind == "byte":
        decoder = tokenizer.stream_decoder()
        assert [decoder.push(byte) for byte in "你".encode()[:2]] == ["", ""]
        assert decoder.finish() == "\ufffd"


def test_a_saved_tokenizer_gives_the_same_ids_and_fingerprint(
    tokenizer: Tokenizer, tmp_path: Path, texts: list[str]
) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.vocab_size, loaded.eos_id, loaded.sha256) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.sha256,
    )
    assert loaded.encode_batch(texts[:20] + HARD) == tokenizer.encode_batch(texts[:20] + HARD)
    for name in tokenizer.files:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content.replace(b"a", b"b", 1))
        with pytest.raises(UserError, match="files were changed"):
            load_tokenizer(tmp_path)


def test_bytes_are_ids_and_0xff_ends_documents() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (256, 255)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A]


def test_characters_are_ranked_by_code_point_and_others_are_unknown() -> None:
    tokenizer = make_tokenizer("char", characters="cab\n")
    assert tokenizer.encode("\nabcz") == [0, 1, 2, 3, 5]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (6, 4)
    assert tokenizer.decode([1, 5, 4]) == "a\ufffd"


def test_special_tokens_in_a_text_are_text_for_hf_and_fastokens_alike(
    bpe: HuggingFaceTokenizer, texts: list[str]
) -> None:
    pytest.importorskip("fastokens")
    sample = [*texts[:100], *HARD, *fuzz(500)]
    slow = bpe.encode_batch(sample)
    fast = HuggingFaceTokenizer(bpe.files["tokenizer.json"])
    assert fast.use_fast_path("require", texts[:20]) and fast.uses_fast_path
    assert fast.encode_batch(sample) == slow
    assert fast.eos_id == 0
    specials = {0, 1}
    assert not specials & {token_id for ids in slow for token_id in ids}
    assert any(bpe._added.get(token_id) == "   " for token_id in bpe.encode("a   b"))


def test_a_fast_path_that_differs_is_refused_or_announced(
    bpe: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(HuggingFaceTokenizer):
        def _fast_arrays(self, texts: object) -> list[np.ndarray]:
            return [ids + (ids == ids.max(initial=0)) for ids in super()._fast_arrays(texts)]  # type: ignore[arg-type]

    wrong = Wrong(bpe.files["tokenizer.json"])
    with pytest.raises(UserError, match="--fast require: fastokens gives other ids than HF"):
        wrong.use_fast_path("require", ["some text"])
    assert wrong.use_fast_path("auto", ["some text"]) is False
    assert "the slow path: fastokens gives other ids" in caplog.text
    assert wrong.encode("some text") == bpe.encode("some text")
    assert wrong.use_fast_path("off", ["some text"]) is False
    monkeypatch.setitem(__import__("sys").modules, "fastokens", None)
    with pytest.raises(UserError, match="fastokens is not installed"):
        HuggingFaceTokenizer(bpe.files["tokenizer.json"]).use_fast_path("require", [])


def test_the_byte_level_decoder_agrees_with_hf(bpe: HuggingFaceTokenizer, texts: list[str]) -> None:
    for ids in bpe.encode_batch([*texts[:50], *fuzz(50)]):
        assert bpe.decode(ids) == bpe._tokenizer.decode(ids, skip_special_tokens=True)


def test_gpt2_files_become_a_tokenizer_json(
    tmp_path: Path, bpe: HuggingFaceTokenizer, texts: list[str]
) -> None:
    model = json.loads(bpe.files["tokenizer.json"])["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    (tmp_path / "encoder.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (tmp_path / "vocab.bpe").write_text(merges, encoding="utf-8")
    made = make_tokenizer(str(tmp_path))
    assert made.kind == "gpt2" and made.eos_id == 0
    assert made.encode_batch(texts[:50]) == bpe.encode_batch(texts[:50])
    content = gpt2_tokenizer_json((tmp_path / "encoder.json").read_bytes(), merges.encode())
    assert made.files == {"tokenizer.json": content}


def test_sentencepiece_training_is_reproducible(sentence_piece: Tokenizer, texts: list[str]) -> None:
    again = make_tokenizer("sentencepiece:360", texts=texts)
    assert again.sha256 == sentence_piece.sha256
    assert sentence_piece.vocab_size == 360
    with pytest.raises(UserError, match=r"tokenizer sentencepiece:50000: training failed \(.*too high"):
        make_tokenizer("sentencepiece:50000", texts=texts[:20])


def test_bad_specifications_are_one_clear_line(tmp_path: Path, bpe: HuggingFaceTokenizer) -> None:
    for spec, words in (
        ("nothing", "allowed are byte, char, gpt2, neox, sentencepiece:SIZE"),
        ("sentencepiece", "write sentencepiece:SIZE"),
        ("sentencepiece:16000:word", "write sentencepiece:SIZE"),
        ("sentencepiece:20", "at least 300"),
    ):
        with pytest.raises(UserError, match=words):
            parse_spec(spec)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer.json"):
        make_tokenizer(str(path))
    described = json.loads(bpe.files["tokenizer.json"])
    described["added_tokens"] = [entry for entry in described["added_tokens"] if not entry["special"]]
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match="use --eos"):
        make_tokenizer(str(path))
    assert make_tokenizer(str(path), eos="\u0120the").eos_id == described["model"]["vocab"]["\u0120the"]
    with pytest.raises(UserError, match="has no token '<zz>'"):
        make_tokenizer(str(path), eos="<zz>")
    described["model"]["dropout"] = 0.1
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match="dropout"):
        make_tokenizer(str(path), eos="\u0120the")
