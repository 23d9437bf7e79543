"""`spikescale evaluate`: a whole split, counted to the last token, in every unit."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikescale.cli.main import main
from spikescale.config import ModelConfig
from spikescale.data_pipeline.manifest import load_manifest
from spikescale.data_pipeline.stream import iterate_documents, split_tokens
from spikescale.data_pipeline.tokenizers import load_tokenizer, make_tokenizer
from spikescale.evaluation.ngram import ByteTrigram
from spikescale.model import SpikeGPT
from spikescale.model.store import load_model_folder, save_model_folder

CONFIG = ModelConfig(layers=2, width=16, vocab_size=256, context_length=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    words = ["spike", "neuron", "état", "of", "the", "membrane", "decays"]
    for number in range(40):
        text = " ".join(rng.choice(words, 12 + number)) + "\n"
        (folder / "text" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    command = ["data", "prepare", "--source", str(folder / "text"), "--tokenizer", "byte", "--no-ray"]
    command += ["--output", str(folder / "prepared"), "--valid-fraction", "0.2", "--test-fraction", "0.3"]
    assert main(command) == 0
    return folder / "prepared"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random"
    # All weights random: as initialised, the context has no influence yet.
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator)
        for name, p in SpikeGPT(CONFIG).named_parameters()
    }
    save_model_folder(folder, weights, CONFIG, make_tokenizer("byte"), {})
    return folder


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_units_follow_from_one_sum_over_the_whole_split(model, data, capsys):
    shown = evaluated(capsys, model, "--data", data)
    totals = load_manifest(data).totals("test")
    assert shown["tokens"] == totals.tokens == len(split_tokens(load_manifest(data), "test"))
    assert (shown["bytes"], shown["characters"]) == (totals.bytes, totals.characters)
    assert totals.tokens == totals.bytes + totals.documents
    bits = shown["token_loss"] * shown["tokens"] / math.log(2)
    assert shown["bits_per_byte"] == pytest.approx(bits / totals.bytes)
    assert shown["bits_per_character"] == pytest.approx(bits / totals.characters)
    assert shown["bits_per_character"] > shown["bits_per_byte"]
    assert shown["token_perplexity"] == pytest.approx(math.exp(shown["token_loss"]))


def test_a_carried_state_gives_the_loss_of_one_parallel_pass(model, data, capsys):
    tokens = split_tokens(load_manifest(data), "valid")
    ids = torch.from_numpy(np.concatenate(([255], tokens[0 : len(tokens)])))
    with torch.no_grad():
        logits, _ = load_model_folder(model).model(ids[None, :-1])
    expected = torch.nn.functional.cross_entropy(logits[0], ids[1:])
    shown = evaluated(capsys, model, "--data", data, "--split", "valid", "--state", "carry")
    assert shown["token_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert shown["stride"] is None


def test_batch_size_does_not_change_the_loss_and_the_stride_does(model, data, capsys):
    losses = [
        evaluated(capsys, model, "--data", data, "--batch-size", batch, "--stride", stride)["token_loss"]
        for batch, stride in ((1, 32), (7, 32), (64, 8))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[2] != pytest.approx(losses[0], rel=1e-6)


def test_the_trigram_baseline_is_fitted_on_train_and_scored_on_the_split(model, data, capsys):
    manifest, tokenizer = load_manifest(data), load_tokenizer(data / "tokenizer")
    train, test = (
        [tokenizer.decode_bytes(ids.tolist()) for ids in iterate_documents(manifest, split)]
        for split in ("train", "test")
    )
    assert sum(map(len, test)) == manifest.totals("test").bytes
    shown = evaluated(capsys, model, "--data", data, "--trigram")
    assert shown["trigram_bits_per_byte"] == pytest.approx(ByteTrigram.fit(train).bits_per_byte(test))
    assert shown["trigram_bits_per_byte"] < 2


def test_without_json_the_result_is_a_table(model, data, capsys):
    assert main(["evaluate", str(model), "--data", str(data), "--limit", "100"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    table = {name.strip(): value.strip() for name, value in lines.items()}
    assert table["tokens"] == "100"
    assert float(table["bits per byte (BPB)"]) > 0
    assert float(table["token perplexity"]) < float(table["word perplexity"])


def test_data_of_another_tokenizer_are_refused(data, tmp_path, capsys):
    config = CONFIG.model_copy(update={"vocab_size": 300})
    tokenizer = make_tokenizer("char", characters="abc")
    save_model_folder(tmp_path / "m", dict(SpikeGPT(config).named_parameters()), config, tokenizer, {})
    assert main(["evaluate", str(tmp_path / "m"), "--data", str(data)]) == 2
    assert "was prepared with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--split", "tset"], "split 'tset': must be one of train, valid, test"),
        (["--stride", "33"], "stride 33: must be from 1 to the context length, 32"),
        (["--stride", "8", "--state", "carry"], "--stride and --state carry exclude each other"),
        (["--window", "0"], "--window 0: must be at least 1"),
        (["--limit", "0"], "--limit 0: must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--num-fewshot", "1"], "--num-fewshot goes with --tasks"),
        (["--detokenize", "ptb"], "detokenize 'ptb': must be one of wikitext"),
    ],
)
def test_bad_options_are_refused_in_one_line(model, data, words, complaint, capsys):
    assert main(["evaluate", str(model), "--data", str(data), *words]) == 2
    err = capsys.readouterr().err
    assert f"error: {complaint}" in err
    assert err.count("\n") == 1


def test_missing_data_are_refused(model, tmp_path, capsys):
    assert main(["evaluate", str(model), "--data", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_words_are_counted_in_the_text_and_pay_for_all_tokens(model, data, capsys):
    shown = evaluated(capsys, model, "--data", data)
    texts = [document.decode() for document in decoded(data, "test")]
    assert shown["words"] == sum(len(text.split()) for text in texts)
    assert shown["line_ends"] == sum(text.count("\n") for text in texts) == shown["documents"]
    nats = shown["token_loss"] * shown["tokens"]
    assert shown["word_perplexity"] == pytest.approx(math.exp(nats / shown["words"]))
    longer = shown["words"] + shown["line_ends"]
    assert shown["word_perplexity_with_line_ends"] == pytest.approx(math.exp(nats / longer))


def decoded(data: Path, split: str) -> list[bytes]:
    tokenizer = load_tokenizer(data / "tokenizer")
    return [tokenizer.decode_bytes(ids.tolist()) for ids in iterate_documents(load_manifest(data), split)]


def test_a_text_as_it_is_costs_what_the_prepared_one_costs(model, data, tmp_path, capsys):
    prepared = evaluated(capsys, model, "--data", data, "--stride", 8)
    files = []
    for number, document in enumerate(decoded(data, "test")):
        files.append(tmp_path / f"{number:02}.notes")  # a suffix that says nothing
        files[-1].write_bytes(document)
    raw = evaluated(capsys, model, "--text", *files, "--stride", 8)
    assert raw["text"].count(".notes") == len(files)
    for key in ("token_loss", "word_perplexity", "bits_per_byte", "tokens", "bytes", "characters", "words"):
        assert raw[key] == pytest.approx(prepared[key], rel=1e-12), key


def test_with_a_limit_only_what_it_needs_is_decoded(model, data, capsys):
    documents = [document.decode() for document in decoded(data, "test")]
    first = len(documents[0]) - 3  # bytes are at least as many
    shown = evaluated(capsys, model, "--data", data, "--limit", first)
    size = len(documents[0].encode()) + 1
    assert shown["words"] == pytest.approx(len(documents[0].split()) * first / size)
    assert shown["tokens"] == first
    rewritten = evaluated(capsys, model, "--data", data, "--limit", first, "--detokenize", "wikitext")
    assert rewritten["bytes"] == pytest.approx(len(documents[0].encode()) * first / size, rel=0.05)


def test_wikitext_is_read_as_written_and_counted_as_published(model, tmp_path, capsys):
    published, written = " The cost was 1 @,@ 000 . \n", "The cost was 1,000.\n"
    (tmp_path / "published.txt").write_text(published)
    (tmp_path / "written.txt").write_text(written)
    shown = evaluated(capsys, model, "--text", tmp_path / "published.txt", "--detokenize", "wikitext")
    plain = evaluated(capsys, model, "--text", tmp_path / "written.txt")
    # The space in front of a line belongs to the corpus too, the one before the first line is text.
    assert shown["bytes"] == plain["bytes"] + 1
    assert (shown["words"], plain["words"]) == (7, 4)
    nats = shown["token_loss"] * shown["tokens"]
    assert shown["word_perplexity"] == pytest.approx(math.exp(nats / 7))


def test_missing_text_and_two_inputs_are_refused(model, data, tmp_path, capsys):
    assert main(["evaluate", str(model), "--text", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(model), "--text", "a.txt", "--data", str(data)])
    (tmp_path / "a.txt").write_text("text")
    assert main(["evaluate", str(model), "--text", str(tmp_path / "a.txt"), "--trigram"]) == 2
    assert "--trigram needs --data" in capsys.readouterr().err
