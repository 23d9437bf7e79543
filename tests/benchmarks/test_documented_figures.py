"""The scripts behind tables of the documents run, in small, and write what the tables are made of."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from spikescale.cli.main import main as spikescale
from spikescale.config import ModelConfig
from spikescale.data_pipeline.manifest import load_manifest
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.energy import PRICES
from spikescale.model import SpikeGPT
from spikescale.model.store import save_model_folder

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def script(monkeypatch):
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def results(module, output, *words):
    """The JSON that a script writes, its threads and its machine's description aside."""
    threads = torch.get_num_threads()
    try:
        assert module.main([*map(str, words), "--output", str(output)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["machine"]["torch"] == torch.__version__
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text("to be or not to be " * (2 + number))
    words = [
        "data",
        "prepare",
        "--source",
        str(folder / "text"),
        "--tokenizer",
        "byte",
        "--no-ray",
        "--quiet",
    ]
    words += ["--output", str(folder / "words"), "--valid-fraction", "0.2", "--test-fraction", "0.3"]
    assert spikescale(words) == 0
    return folder / "words"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of two variants, with random weights."""
    folders = []
    for variant in ("rwkv", "spikegpt-driven"):
        config = ModelConfig(
            layers=2,
            width=16,
            vocab_size=256,
            context_length=32,
            variant=variant,
            binary_embedding=variant != "rwkv",
        )
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator)
            for name, p in SpikeGPT(config).named_parameters()
        }
        folders.append(tmp_path_factory.mktemp("runs") / variant)
        save_model_folder(folders[-1], weights, config, make_tokenizer("byte"), {})
    return folders


def test_strides_are_those_of_the_command(script, models, data, tmp_path, capsys):
    module = script("evaluation_strides")
    words = [*models, "--data", data, "--limit", "100", "--strides", "8"]
    found = results(module, tmp_path / "strides.json", *words)
    assert found["data"] == {"source": load_manifest(data).source, "sha256": load_manifest(data).sha256}
    assert found["command"] == (
        "python benchmarks/evaluation_strides.py rwkv spikegpt-driven --data words --limit 100 --strides 8"
        " --output strides.json"
    )
    capsys.readouterr()
    for run in models:
        row = found["rows"][run.name]
        settings = json.loads((run / "model.json").read_text())
        assert (row["variant"], row["weights_sha256"]) == (run.name, settings["weights_sha256"])
        assert (row["window"], row["tokens"]) == (32, 100)
        assert set(row["bits_per_byte"]) == {"default", "--stride 8", "--state carry"}
        assert row["bits_per_byte"]["default"] != row["bits_per_byte"]["--stride 8"]
        command = ["evaluate", str(run), "--data", str(data), "--limit", "100", "--stride", "8", "--json"]
        assert spikescale(command) == 0
        shown = json.loads(capsys.readouterr().out)
        assert row["bits_per_byte"]["--stride 8"] == pytest.approx(shown["bits_per_byte"])
    assert module.main([str(tmp_path / "none"), "--data", str(data)]) == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_energy_is_given_at_every_price(script, models, data, tmp_path):
    found = results(
        script("energy_variants"), tmp_path / "energy.json", *models, "--data", data, "--limit", 64
    )
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")
    rwkv, driven = (found["rows"][run.name] for run in models)
    for price in PRICES:
        assert rwkv["at_prices"][price]["whole_ratio"] == pytest.approx(1.0)
        assert driven["at_prices"][price]["whole_ratio"] > 1.2
    assert rwkv["accumulations"] == 0 < driven["accumulations"]
    loihi = driven["accumulations_microjoules_on_chips"]["Loihi (14 nm)"]
    assert loihi == pytest.approx(driven["accumulations"] * 23.6e-6)
    assert found["prices"]["45nm-float32"]["mac"] == pytest.approx(4.6)


def test_energy_at_a_rate_is_bounded_by_what_remains_without_spikes(script, tmp_path):
    words = ["--presets", "tiny", "--tokens", "16"]
    found = results(script("energy_at_size"), tmp_path / "size.json", *words)["whole_ratio"]["tiny"]
    assert found["0"] > found["0.05"] > found["0.1"] > found["0.15"] > found["0.3"] > 1
    # The token mixtures, norms and so on of the preset, whatever the text: as in the document.
    assert found["0.15"] == pytest.approx(_kept("energy_at_size")["whole_ratio"]["tiny"]["0.15"], rel=0.01)


def test_widths_are_trained_at_every_rate_from_every_seed(script, tmp_path, monkeypatch):
    module = script("width_transfer")
    built = []

    def build(config, seed):
        built.append((config.layers, seed))
        return SpikeGPT(config, seed)

    monkeypatch.setattr(module, "SpikeGPT", build)
    words = ["--quick", "--seeds", "0", "1", "--settings", "two layers"]
    found = results(module, tmp_path / "widths.json", *words)
    assert (tmp_path / "widths.png").read_bytes().startswith(b"\x89PNG")
    setting = found["settings"]["two layers"]
    rows = [(row["width"], row["width_transfer"]) for row in setting["rows"]]
    assert rows == [(32, 32), (64, 32), (64, None)]
    losses = np.array([list(row["losses"].values()) for row in setting["rows"]])
    assert losses.shape == (3, 2, 2)
    assert len(np.unique(losses)) == losses.size  # neither rate nor seed nor muP is without effect
    assert built == [(2, 0)] * 6 + [(2, 1)] * 6
    last = module.train(64, None, 8e-3, 6, seed=1)[0][-5:]
    assert setting["rows"][2]["losses"]["0.008"][1] == pytest.approx(sum(last) / 5)


def test_coverage_counts_ladders_and_starts(script, tmp_path, monkeypatch):
    monkeypatch.setattr("spikescale.scaling.forms.EXPONENTS", np.array([0.3, 0.6]))
    module, output = script("fit_coverage"), tmp_path / "coverage.json"
    found = results(module, output, "--parts", "coverage", "--ladders", "2", "--rounds", "5")
    assert set(found["coverage"]["held"]) == {"noise", "residuals"}
    for hits in found["coverage"]["held"].values():
        assert set(hits) == {"E", "alpha", "beta", "far"}
        assert all(0 <= count <= 2 for count in hits.values())
    later = results(module, output, "--parts", "starts", "--every", "400")
    assert later["coverage"] == found["coverage"]
    arrived = later["starts"]["arrived"]
    assert arrived["variable projection"] == {"starts": 4, "with_steps": 4, "without_steps": 4}
    assert arrived["published"]["starts"] == 12
    assert 0 < arrived["published"]["without_steps"] <= arrived["published"]["with_steps"] <= 12


def _kept(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _cells(document, first_cell):
    """The cells of the first table row of a document that begins so, without bold and units."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    (row, *_) = re.findall(rf"^\| {re.escape(first_cell)} \|(.*)\|$", text, re.MULTILINE)
    return [cell.strip().strip("*") for cell in row.split("|")]


def test_documents_show_what_the_files_have():
    for run, row in _kept("evaluation_strides")["rows"].items():
        ways = ("default", "--stride 64", "--stride 16", "--state carry")
        shown = [f"{row['bits_per_byte'][way]:.4f}" for way in ways]
        assert _cells("evaluation.md", f"`{run.removesuffix('-seed0')}`") == shown
    for preset, ratios in _kept("energy_at_size")["whole_ratio"].items():
        assert _cells("energy.md", preset) == [
            f"{ratios[r]:.1f}x" for r in ("0.05", "0.1", "0.15", "0.3", "0")
        ]
    driven = _kept("energy")["rows"]["spikegpt-driven-seed0"]["at_prices"]
    for price, found in driven.items():
        assert _cells("energy.md", price)[-1] == f"{found['whole_ratio']:.1f}x"
    for attempt, measured in _kept("driven_gap")["attempts"].items():
        bits = [seed["bits_per_byte"] for seed in measured["seeds"].values()]
        shown = f"{sum(bits) / len(bits):.3f} ({', '.join(f'{value:.3f}' for value in bits)})"
        assert _cells("energy.md", attempt)[:2] == [str(len(bits)), shown]
    setting = _kept("width_transfer")["settings"]["two layers"]
    rates = [f"{rate:g}" for rate in setting["rates"]]
    for row in setting["rows"]:
        kind = "muP" if row["width_transfer"] else "ordinary"
        first = "32" if row["width"] == 32 else f"{row['width']}, {kind}"
        assert _cells("scaling.md", first) == [f"{np.mean(row['losses'][rate]):.3f}" for rate in rates]
    text = " ".join((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split())
    held = _kept("fit_coverage")["coverage"]["held"]
    order = ("E", "alpha", "beta", "far")
    e, alpha, beta, far = (held["noise"][symbol] for symbol in order)
    assert f"held E in {e}, alpha in {alpha}, beta in {beta}, and the loss of a model" in text
    assert f"six times the tokens in {far}:" in text
    e, alpha, beta, far = (held["residuals"][symbol] for symbol in order)
    assert f"(`residuals`) held {e}, {alpha}, {beta} and {far}:" in text
    found = _kept("fit_coverage")["starts"]["arrived"]["published"]
    assert f"of {found['starts']} of the 4,500 starts" in text
    assert found["with_steps"] == found["starts"]
    assert f"{found['without_steps']} without." in text


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_the_ladders_tables_are_those_of_their_files(script, name, monkeypatch, capsys):
    tables = script("scaling_tables")
    monkeypatch.setattr("sys.argv", ["scaling_tables.py", name])
    assert tables.main() == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("|---")]
    rows = [line for line in shown if not line.startswith("| family | form | 216m")]
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert len(rows) > 30
    assert not [line for line in rows if line not in text]
