"""The comparison of attempts to close the driven variant's gap: its runs, its skipping and its arithmetic."""

import argparse
import importlib
import json
from pathlib import Path

import pytest

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


def test_kept_results_are_of_attempts_that_are_still_there(gap):
    results = json.loads(gap.RESULTS.read_text())
    assert results["attempts"].keys() <= gap.ATTEMPTS.keys()
    for name, attempt in results["attempts"].items():
        assert attempt["settings"] == gap.ATTEMPTS[name]
