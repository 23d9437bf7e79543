"""Energies, ratios, the paper's table, and the command."""

import json
from pathlib import Path

import pytest
import torch
from test_operation_counts import make_model, some_tokens

from spikescale.cli.main import main
from spikescale.config import ModelConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.energy import PRICES, Count, Part, count_operations, summarise
from spikescale.energy.paper import erratum_ratio, table_1
from spikescale.energy.summary import by_layer, twin_total
from spikescale.model import SpikeGPT
from spikescale.model.store import save_model_folder

HOROWITZ = PRICES["45nm-float32"]


def test_prices_make_energies():
    assert HOROWITZ.mac == pytest.approx(4.6)
    assert PRICES["paper"].mac == pytest.approx(4.5)
    count = Count(mac=2, ac=3, multiply=5, add=7, special=11, lookup=13)
    wanted = 2 * 4.6 + 3 * 0.9 + 5 * 3.7 + 7 * 0.9 + 11 * 7.1 * 3.7
    assert count.energy(HOROWITZ) == pytest.approx(wanted)


def test_ratios_by_hand():
    parts = [
        Part("block 0", "a", "projection", Count(ac=10), "spikes", 0.1, 1, Count(mac=100)),
        Part("block 0", "b", "projection", Count(mac=50), "floats", 0.5, 0, Count(mac=50)),
        Part("block 0", "n", "neuron", Count(multiply=4), twin=Count()),
        Part("block 0", "n.sum", "residual", Count(add=2), rate=0.25, twin=Count(add=8)),
        Part("head", "head", "head", Count(mac=30), "floats", 1.0, 0, Count(mac=30)),
    ]
    found = summarise(parts, HOROWITZ)
    assert found.projection_ratio == pytest.approx(150 * 4.6 / (10 * 0.9 + 50 * 4.6))
    block = 9 + 50 * 4.6 + 4 * 3.7 + 2 * 0.9
    assert found.block_ratio == pytest.approx((150 * 4.6 + 8 * 0.9) / block)
    assert found.whole_ratio == pytest.approx((180 * 4.6 + 8 * 0.9) / (block + 30 * 4.6))
    assert found.zero_skipping_energy == pytest.approx(block + 30 * 4.6 - 25 * 4.6)
    assert found.head_energy == pytest.approx(30 * 4.6)
    assert (found.spike_rate, found.projections_reading_spikes, found.projections) == (0.1, 1, 2)


def test_the_twin_of_every_variant_is_rwkv():
    wanted = twin_total(count_operations(make_model("rwkv"), some_tokens(), context_length=50), HOROWITZ)
    for variant in ("heaviside-rwkv", "spikegpt", "spikegpt-driven"):
        parts = count_operations(make_model(variant), some_tokens(), context_length=50)
        assert twin_total(parts, HOROWITZ) == pytest.approx(wanted), variant
    rwkv = summarise(count_operations(make_model("rwkv"), some_tokens(), context_length=50), HOROWITZ)
    assert rwkv.whole_ratio == pytest.approx(1.0)


def test_only_where_projections_read_spikes_is_anything_saved():
    ratios = {}
    for variant in ("heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven"):
        parts = count_operations(make_model(variant), some_tokens(), context_length=50)
        ratios[variant] = summarise(parts, HOROWITZ).projection_ratio
        assert sum(map(sum, (row.values() for row in by_layer(parts, HOROWITZ).values()))) == pytest.approx(
            summarise(parts, HOROWITZ).energy
        )
    assert ratios["heaviside-rwkv"] == ratios["spikegpt"] == 1.0
    assert 1.2 < ratios["spikegpt-b"] < 1.7  # a third of the weights is behind spikes
    assert ratios["spikegpt-driven"] > 5.1  # 4.6 / 0.9, and sparsity


def test_table_1_is_the_printed_one_but_for_its_erratum():
    rows = table_1()
    for row in rows[:-1]:
        wrong = row.name == "f(Q/R, K, V)"
        assert (row.gpt == pytest.approx(row.gpt_printed, rel=0.01)) != wrong
        assert bool(row.note) == wrong
        if row.spikegpt is not None:
            assert row.spikegpt == pytest.approx(row.spikegpt_printed, rel=0.01)
    attention = rows[1]
    assert attention.gpt == pytest.approx(4.35e10, rel=0.01)
    assert attention.gpt / attention.gpt_printed == pytest.approx(512, rel=0.01)
    as_printed, corrected = erratum_ratio(rows)
    assert as_printed == pytest.approx(32.2, abs=0.5)
    assert corrected == pytest.approx(74.2, abs=0.1)
    assert all(row.gpt_printed is None and not row.note for row in table_1(length=256))


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    tokenizer = make_tokenizer("byte")
    folders = []
    for variant in ("spikegpt", "spikegpt-driven"):
        config = ModelConfig(
            variant=variant, layers=1, width=16, vocab_size=tokenizer.vocab_size, context_length=32
        )
        torch.manual_seed(0)
        weights = {name: p + 0.3 * torch.randn(p.shape) for name, p in SpikeGPT(config).named_parameters()}
        save_model_folder(tmp_path / variant, weights, config, tokenizer, {})
        folders.append(tmp_path / variant)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 5)
    return folders


def test_the_command_writes_table_numbers_and_picture(runs, tmp_path, capsys):
    words = [*map(str, runs), "--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")]
    assert main(["energy", *words, "--price-list", "--table-1"]) == 0
    shown = capsys.readouterr().out
    for words_shown in ("1.00x", "the paper claims 32.2x", "TrueNorth", "7nm-int8", "without the factor d"):
        assert words_shown in shown
    numbers = json.loads((tmp_path / "out" / "energy.json").read_text())
    driven = numbers["spikegpt-driven (spikegpt-driven)"]
    assert driven["summary"]["projections_reading_spikes"] == 7
    assert sum(part["picojoules"] for part in driven["parts"]) == pytest.approx(driven["summary"]["energy"])
    assert (tmp_path / "out" / "energy.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    text = tmp_path / "text.txt"
    (tmp_path / "empty.txt").write_text(" \n")
    for words, complaint in (
        ([str(runs[0])], "--text is missing"),
        ([], "name a model"),
        ([str(runs[0]), "--text", str(tmp_path / "none.txt")], "cannot be read"),
        ([str(runs[0]), "--text", str(tmp_path / "empty.txt")], "holds no text"),
        ([str(runs[0]), "--text", str(text), "--prices", "3nm"], "there are 45nm-float32"),
        ([str(runs[0]), "--text", str(text), "--limit", "0"], "must be 1 or more"),
        ([str(tmp_path / "nothing"), "--text", str(text)], "no such folder"),
    ):
        assert main(["energy", *words]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
