"""Category and source as ids in front of documents: learnt from the training split, never in a text."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from spikescale.cli.main import main
from spikescale.data_pipeline.manifest import Manifest, load_manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import open_source
from spikescale.data_pipeline.split import split_of
from spikescale.data_pipeline.tokenizers import load_tokenizer
from spikescale.data_pipeline.tokenizers.byte import ByteTokenizer
from spikescale.data_pipeline.tokenizers.conditioned import MOST_VALUES, ConditionedTokenizer, conditioned
from spikescale.data_pipeline.tokens import iterate_documents
from spikescale.errors import UserError

KEYS = ("category", "source")


def category(number: int) -> str:
    return ["physics", "art", "<|endoftext|>"][number % 3]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("records") / "wiki.en.jsonl"
    lines = [{"text": text, "category": category(number)} for number, text in enumerate(texts)]
    del lines[5]["category"]
    lines[6]["source"] = "elsewhere"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def prepared_with(path: Path, folder: Path, parts: int = 4, **settings: object) -> Manifest:
    source = open_source([str(path)], partition_bytes=path.stat().st_size // parts + 1, metadata_keys=KEYS)
    chosen = PrepareSettings(ray=False, quiet=True, condition_on=KEYS, **settings)  # type: ignore[arg-type]
    return prepare(source, folder, chosen)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, records: Path) -> Manifest:
    return prepared_with(records, tmp_path_factory.mktemp("conditioned") / "data", condition_dropout=0.25)


def test_each_document_begins_with_the_ids_of_its_values(manifest: Manifest, texts: list[str]) -> None:
    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    assert isinstance(tokenizer, ConditionedTokenizer)
    assert tokenizer.values == {
        "category": ("<|endoftext|>", "art", "physics"),
        "source": ("elsewhere", "wiki"),
    }
    assert manifest.tokenizer.vocab_size == 256 + 5 and manifest.tokenizer.kind == "byte+conditions"
    ids = {"<|endoftext|>": 256, "art": 257, "physics": 258}
    numbers = {text: number for number, text in enumerate(texts)}
    bare = 0
    for split in manifest.splits:
        for document in iterate_documents(manifest, split):
            text = tokenizer.decode(document.tolist())
            number = numbers[text]
            prefix = document[document >= 256].tolist()
            assert document[: len(prefix)].tolist() == prefix
            if not prefix:
                bare += 1
                continue
            expected = [] if number == 5 else [ids[category(number)]]
            assert prefix == [*expected, 259 if number == 6 else 260]
            decoder = tokenizer.stream_decoder()
            assert "".join(map(decoder.push, document.tolist())) + decoder.finish() == text
    assert 70 < bare < 130  # of 400, a quarter


def test_sizes_are_those_of_the_text_alone(manifest: Manifest, prepared: Manifest) -> None:
    for split in manifest.splits:
        ours, plain = manifest.totals(split), prepared.totals(split)
        assert (ours.documents, ours.bytes, ours.characters) == (
            plain.documents,
            plain.bytes,
            plain.characters,
        )
        assert ours.tokens > plain.tokens
    assert manifest.max_id == 260


def test_the_result_does_not_depend_on_the_partitioning(
    manifest: Manifest, tmp_path: Path, records: Path
) -> None:
    other = prepared_with(records, tmp_path / "one", parts=1, condition_dropout=0.25)
    assert other.tokenizer == manifest.tokenizer
    for split in manifest.splits:
        ours = sorted(document.tobytes() for document in iterate_documents(manifest, split))
        theirs = sorted(document.tobytes() for document in iterate_documents(other, split))
        assert ours == theirs
    with pytest.raises(UserError, match=r"holds data prepared otherwise \(tokenizer differ\)"):
        prepared_with(records, tmp_path / "one", parts=1, condition_dropout=0.5)


def test_the_fast_path_of_the_tokenizer_inside_is_used(
    tmp_path: Path, records: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastokens")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from spikescale.data_pipeline.tokenizers.huggingface import HuggingFaceTokenizer

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    spec = str(tmp_path / "tokenizer.json")
    slow = prepared_with(records, tmp_path / "slow", tokenizer=spec, fast="off")
    used = 0
    quick = HuggingFaceTokenizer._fast_arrays

    def counted(self: HuggingFaceTokenizer, batch: Sequence[str]) -> list[np.ndarray]:
        nonlocal used
        used += len(batch)
        return quick(self, batch)

    monkeypatch.setattr(HuggingFaceTokenizer, "_fast_arrays", counted)
    fast = prepared_with(records, tmp_path / "fast", tokenizer=spec, fast="require")
    assert fast.sha256 == slow.sha256 and fast.tokenizer.kind == "tokenizer.json+conditions"
    assert used > 400  # every document, and the comparison before
    tokenizer = load_tokenizer(fast.tokenizer_folder)
    (first, *_) = iterate_documents(fast, "train")
    assert tokenizer.decode(first.tolist()) in texts


def test_dropout_is_by_hash_and_independent_of_the_split() -> None:
    tokenizer = ConditionedTokenizer(ByteTokenizer(), {"category": ["a"]}, 0.2)
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(4000)]
    settings = PrepareSettings().split
    for split in ("train", "valid"):
        mine = [digest for digest in digests if split_of(digest, settings) == split]
        bare = sum(not tokenizer.prefix([("category", "a")], digest) for digest in mine)
        assert bare / len(mine) == pytest.approx(0.2, abs=0.075)
    always = ConditionedTokenizer(ByteTokenizer(), {"category": ["a"]}, 0.0)
    never = ConditionedTokenizer(ByteTokenizer(), {"category": ["a"]}, 1.0)
    assert all(always.prefix([("category", "a")], digest) == [256] for digest in digests[:200])
    assert not any(never.prefix([("category", "a")], digest) for digest in digests[:200])
    assert always.prefix([("category", "unknown"), ("other", "a")], digests[0]) == []
    assert len({always.sha256, never.sha256, tokenizer.sha256, ByteTokenizer().sha256}) == 4


def test_values_outside_the_training_split_are_announced(
    tmp_path: Path, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = PrepareSettings().split
    held_out = [t for t in texts if split_of(hashlib.sha256(t.encode()).digest(), settings) != "train"]
    lines = [{"text": text, "category": "rare" if text == held_out[0] else "common"} for text in texts]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        manifest = prepared_with(path, tmp_path / "out")
    assert "category=rare: not in the training split" in caplog.text
    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    assert isinstance(tokenizer, ConditionedTokenizer)
    assert tokenizer.values == {"category": ("common",), "source": ("a",)}


def test_new_values_in_text_that_is_added_are_announced(
    tmp_path: Path, records: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared_with(records, tmp_path / "out")
    more = tmp_path / "more.jsonl"
    lines = [{"text": f"More {number}.", "category": ["art", "music"][number % 2]} for number in range(80)]
    more.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        manifest = prepared_with(more, tmp_path / "out", append=True)
    assert "category=music, source=more: not in the training split" in caplog.text
    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    added = {tokenizer.decode(d.tolist()): d for d in iterate_documents(manifest, "train")}
    prefixes = [added[text][added[text] >= 256].tolist() for text in added if text.startswith("More")]
    assert sorted(map(tuple, {tuple(prefix) for prefix in prefixes})) == [(), (257,)]


def test_parquet_columns_and_folders_give_metadata(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    folder = tmp_path / "in"
    (folder / "books").mkdir(parents=True)
    table = pa.table({"text": ["one", "two"], "category": ["x", None], "year": [1905, 1915]})
    pyarrow.parquet.write_table(table, folder / "books" / "a.parquet")
    (folder / "notes.txt").write_text("three")
    keys = ("source", "year", "category")
    (partition,) = open_source([str(folder)], metadata_keys=keys).partitions()
    assert [document.metadata for document in partition.documents()] == [
        (("source", "books"), ("year", "1905"), ("category", "x")),
        (("source", "books"), ("year", "1915")),
        (("source", "notes"),),
    ]
    plain = open_source([str(folder)])
    assert all(not document.metadata for part in plain.partitions() for document in part.documents())
    assert "metadata_keys" not in plain.identity()  # so that folders prepared before are still known


def test_bad_metadata_is_one_clear_line(tmp_path: Path, jsonl: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "category": ["x"]}\n')
    (partition,) = open_source([str(path)], metadata_keys=("category",)).partitions()
    with pytest.raises(UserError, match=r"a.jsonl, line 1: 'category' must hold a text .* not list"):
        list(partition.documents())
    with pytest.raises(UserError, match="--condition-on category: no document of the training split has it"):
        prepared_with(jsonl, tmp_path / "out")
    many = [("category", str(number)) for number in range(MOST_VALUES + 1)]
    with pytest.raises(UserError, match=r"4097 values \(category 4097\), at most 4096"):
        conditioned(ByteTokenizer(), ["category"], many, 0.1)
    with pytest.raises(UserError, match=r"condition_dropout = 1.5: must be from 0 to 1"):
        conditioned(ByteTokenizer(), ["category"], many[:3], 1.5)


def test_the_command_takes_keys_and_says_what_is_wrong(
    tmp_path: Path, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["data", "prepare", "--source", str(records), "--output", str(output), "--no-ray", "--quiet"]
    assert main([*words, "--condition-on", "category,source", "--condition-dropout", "0"]) == 0
    assert load_manifest(output).tokenizer.vocab_size == 261
    capsys.readouterr()
    assert main(["data", "inspect", str(output), "--no-histogram"]) == 0
    assert "--- train, document 0\nDocument " in capsys.readouterr().out  # conditions are no text
    assert main([*words, "--condition-on", "category,category"]) == 2
    assert "a key is given twice" in capsys.readouterr().err


def test_generation_starts_from_a_condition(
    tmp_path: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    from spikescale.config import ModelConfig
    from spikescale.inference.text import start_of_document
    from spikescale.model import SpikeGPT
    from spikescale.model.store import save_model_folder

    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    assert start_of_document(tokenizer, [("source", "wiki"), ("category", "art")]) == [255, 257, 260]
    assert start_of_document(tokenizer, []) == []
    config = ModelConfig(layers=1, width=16, vocab_size=261, context_length=32, binary_embedding=False)
    weights = {name: p.detach().clone() for name, p in SpikeGPT(config, seed=1).named_parameters()}
    weights["ln_out.bias"] = torch.ones(16)
    weights["head.weight"] = 0.5 * torch.randn(261, 16, generator=torch.Generator().manual_seed(0))
    weights["head.weight"][97:123] += 1
    folder = tmp_path / "model"
    save_model_folder(folder, weights, config, tokenizer, {})
    texts = []
    for words in ([], ["--condition", "category=art"], ["--condition", "category=physics"]):
        assert main(["generate", str(folder), "--tokens", "40", *words]) == 0
        texts.append(capsys.readouterr().out)
        assert len(texts[-1]) == 41 and texts[-1].strip().isalpha()
    assert len(set(texts)) == 3
    for condition, expected in (
        ("category=music", "known are <|endoftext|>, art, physics"),
        ("mood=gay", "the keys are category, source"),
        ("art", "write KEY=VALUE"),
    ):
        assert main(["generate", str(folder), "--condition", condition]) == 2
        assert expected in capsys.readouterr().err
    with pytest.raises(UserError, match="prepared without --condition-on"):
        start_of_document(ByteTokenizer(), [("category", "art")])


def test_conditions_cost_nothing_in_evaluation() -> None:
    """The loss of a split is that of its text, given its conditions; bits a byte stay comparable."""
    from spikescale.config import ModelConfig
    from spikescale.evaluation import LanguageModelResult, evaluate_tokens
    from spikescale.evaluation.language_model import count_conditions
    from spikescale.model import SpikeGPT

    model = SpikeGPT(
        ModelConfig(layers=1, width=16, vocab_size=20, context_length=64, binary_embedding=False), seed=0
    )
    tokens = np.array([17, 3, 4, 5, 1, 18, 19, 2, 2, 1, 7, 1])
    with torch.no_grad():
        inputs = torch.from_numpy(np.concatenate([[1], tokens[:-1]]))[None]
        logits = torch.log_softmax(model(inputs)[0][0].double(), dim=-1)
    losses = -logits[torch.arange(len(tokens)), torch.from_numpy(tokens)].numpy()
    whole, _ = evaluate_tokens(model, tokens, context_length=64, eos_id=1)
    text, covered = evaluate_tokens(model, tokens, context_length=64, eos_id=1, text_ids=17)
    assert whole == pytest.approx(losses.sum(), rel=1e-5)
    assert text == pytest.approx(losses[tokens < 17].sum(), rel=1e-5) and covered == 12
    assert count_conditions(tokens, 17) == 3 and count_conditions(tokens, 17, limit=6) == 2
    result = LanguageModelResult.from_sum(
        text, covered, split_tokens=12, split_bytes=6, split_characters=6, conditions=3
    )
    assert result.tokens == 9 and result.loss == pytest.approx(text / 9)
    assert result.bits_per_byte == pytest.approx(text / np.log(2) / 6)
