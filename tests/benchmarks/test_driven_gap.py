"""The comparison of attempts to close the driven variant's gap: its runs, its skipping and its arithmetic."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch

from spikescale.config import load_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gap(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("driven_gap")


def found(variant, bits, **figures):
    seeds = {}
    for seed, value in enumerate(bits):
        seeds[str(seed)] = {
            "bits_per_byte": value,
            "spike_rate": figures.get("rate"),
            "silent_neuron_layers": 1,
            "neuron_layers": 4,
            "microjoules": 0.5,
            "projection_ratio": 20.0,
            "whole_ratio": 8.0,
        }
    return {"settings": {"model.variant": variant}, "seeds": seeds}


def test_every_attempt_is_a_run_that_the_settings_allow(gap):
    file = BENCHMARKS.parent / "configs" / "run" / "tiny.yaml"
    for name, changes in gap.ATTEMPTS.items():
        settings = {**gap.BUDGET, **changes, "data.path": "data"}
        words = [f"{key}={value}" for key, value in settings.items() if value != gap.TEACHER]
        config = load_config(file, words)
        assert config.model.variant == changes["model.variant"], name
    names = [gap.run_name(name, 0) for name in gap.ATTEMPTS]
    assert len(set(names)) == len(names)


def test_the_table_says_how_much_of_the_gap_is_closed(gap):
    attempts = {
        "rwkv": found("rwkv", [2.0, 2.2]),
        "driven": found("spikegpt-driven", [3.5, 3.7], rate=0.1),
        "better": found("spikegpt-driven", [2.7, 2.9], rate=0.2),
    }
    lines = gap.table(attempts).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| rwkv", "| better", "| driven"]
    assert "| 2 | 2.800 (2.700, 2.900) | 53% | 0.200 | 1 of 4 | 0.500 | 20.00x | 8.00x |" in lines[3]
    assert "| 3.600 (3.500, 3.700) | 0% |" in lines[4]
    assert "| 2.100 (2.000, 2.200) | - | - |" in lines[2]


def test_what_is_finished_is_not_trained_again_and_a_pupil_needs_its_teacher(gap, tmp_path, monkeypatch):
    started = []

    def run(command, **options):
        name = next(word for word in command if word.startswith("name="))[5:]
        started.append(name)
        (tmp_path / name).mkdir()
        return argparse.Namespace(returncode=1 if name.startswith("spikegpt") else 0)

    monkeypatch.setattr(gap.subprocess, "run", run)
    monkeypatch.setattr(gap.time, "sleep", lambda seconds: None)
    arguments = argparse.Namespace(
        runs=tmp_path,
        data=tmp_path,
        seeds=[0],
        attempts=["distilled", "rwkv", "spikegpt"],
        lock=tmp_path / "lock",
        hold=60,
    )
    assert gap.train(arguments) == 1  # the teacher was not there, and spikegpt failed
    assert started == ["rwkv-s0", "spikegpt-s0"]
    arguments.attempts = ["distilled", "rwkv"]
    assert gap.train(arguments) == 0
    assert started == ["rwkv-s0", "spikegpt-s0", "distilled-s0"]


def test_only_measurements_of_the_same_budget_data_and_settings_are_kept(gap, tmp_path, monkeypatch, capsys):
    data = {"source": "text", "sha256": "abc"}
    measured = []

    def measure(folder, data):
        measured.append(folder.name)
        return found("x", [2.0 if folder.name == "rwkv-s0" else 3.0])["seeds"]["0"]

    monkeypatch.setattr(gap, "RESULTS", tmp_path / "gap.json")
    monkeypatch.setattr(gap, "described_data", lambda path: data)
    monkeypatch.setattr(gap, "measured", measure)
    monkeypatch.setattr(gap, "draw", lambda attempts, path: None)
    arguments = argparse.Namespace(
        runs=tmp_path / "gap", data=tmp_path / "words", seeds=[0], attempts=["rwkv", "driven", "2 bits"]
    )

    def finish(name, *changes):
        """A run folder as pretraining leaves it."""
        folder = arguments.runs / gap.run_name(name, 0)
        folder.mkdir(parents=True, exist_ok=True)
        settings = load_config(gap.TINY, [*gap.words_of(arguments, name, 0), *changes])
        (folder / "config.yaml").write_text(json.dumps(settings.model_dump(mode="json")))
        (folder / "done").touch()

    def report():
        measured.clear()
        code = gap.report(arguments)
        return code, sorted(measured), json.loads(gap.RESULTS.read_text())

    finish("rwkv", "model.vocab_size=256", "train.evaluate_every=50")  # of no influence on the weights
    finish("driven")
    code, new, results = report()
    assert (code, new) == (0, ["driven-s0", "rwkv-s0"])
    assert results["data"] == {"source": "text", "sha256": "abc"} and results["budget"] == gap.BUDGET
    expected = (
        "python benchmarks/driven_gap.py report --data words --runs gap --seeds 0 --attempts rwkv driven"
    )
    assert results["command"] == f"{expected} '2 bits'"
    assert results["machine"]["torch"] == torch.__version__
    assert report()[:2] == (0, [])
    # An attempt that means something else now, and a new budget, price or data set.
    monkeypatch.setitem(gap.ATTEMPTS, "driven", gap.driven(tau=3.0))
    finish("driven")
    assert report()[:2] == (0, ["driven-s0"])
    data["sha256"] = "def"
    code, new, results = report()
    assert new == ["driven-s0", "rwkv-s0"] and results["data"]["sha256"] == "def"
    capsys.readouterr()
    monkeypatch.setitem(gap.BUDGET, "train.lr", 1e-3)
    code, new, results = report()  # the runs are of the old budget, too
    assert (code, new, results["attempts"]) == (1, [], {})
    said = capsys.readouterr().err
    assert "gap.json: of another budget; everything is measured again" in said
    assert "rwkv-s0: left out: train.lr was 0.002, not 0.001" in said
    finish("rwkv")
    finish("driven", "model.neuron.tau=2.0")
    code, new, _ = report()
    assert (code, new) == (1, ["rwkv-s0"])
    assert "driven-s0: left out: model.neuron was" in capsys.readouterr().err


def test_a_command_names_no_folder_of_the_machine(gap, tmp_path):
    common = importlib.import_module("common")
    inside = common.ROOT / "runs" / "some gap"
    assert common.command_line("x.py", [str(inside), "--data", str(tmp_path / "words"), "a=1"]) == (
        "python benchmarks/x.py 'runs/some gap' --data words a=1"
    )


def test_kept_results_are_of_attempts_that_are_still_there(gap):
    results = json.loads(gap.RESULTS.read_text())
    assert results["attempts"].keys() <= gap.ATTEMPTS.keys()
    for name, attempt in results["attempts"].items():
        assert attempt["settings"] == gap.ATTEMPTS[name]
