"""A small prepared data set of many shards, and a run file for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = {
    "whole": "",
    "one": "zero.stage=0 faults.inject=nan@5",
    "rolled": "faults.inject=nan@8-10",
    "limited": "faults.inject=nan@8-10 faults.rollback_limit=0",
    "early": "faults.inject=nan@1-3",
    "warned": "faults.inject=spike@11",
    "skipped": "faults.inject=spike@11 faults.spike_action=skip",
    "returned": "faults.inject=spike@11 faults.spike_action=roll-back",
    "silenced": "train.steps=18 faults.inject=silence@9-13:blocks.1.channel_neuron mlflow.enabled=true",
}

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # where `launching` is


@pytest.fixture(scope="session")
def sharded_data(tmp_path_factory) -> Path:
    """Sixty documents as byte tokens, a shard each, so that a run opens new ones all the time."""
    from launching import write_corpus

    from spikescale.data_pipeline.prepare import PrepareSettings, prepare
    from spikescale.data_pipeline.sources import open_source
    from spikescale.data_pipeline.split import SplitSettings

    folder = tmp_path_factory.mktemp("sharded")
    write_corpus(folder / "text")
    source = open_source([str(folder / "text")], partition_bytes=1000)
    settings = PrepareSettings(ray=False, quiet=True, split=SplitSettings(0.1, 0.1))
    prepare(source, folder / "prepared", settings)
    return folder / "prepared"


@pytest.fixture(scope="session")
def make_run_file(sharded_data):
    """Write a complete run of seconds to a folder: `make_run_file(folder)`; the file's path."""
    from launching import TINY

    def make(folder: Path) -> Path:
        train = {**TINY["train"], "save_every": 4, "evaluate_every": 4, "final_evaluation_tokens": 500}
        content = {
            **TINY,
            "name": "run",
            "output": str(folder / "runs"),
            "data": {"path": str(sharded_data), "shuffle_window": 1},
            "model": {**TINY["model"], "dropout": 0.1},
            "train": {**train, "sample_count": 0},
            "faults": {"hang_seconds": 60.0},
        }
        path = folder / "run.yaml"
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="session")
def runs(tmp_path_factory, make_run_file):
    """Each of RUNS in one process: (the folder of all, the end of each, the run file)."""
    folder = tmp_path_factory.mktemp("anomalies")
    file = make_run_file(folder)
    command = [sys.executable, str(Path(__file__).parent / "runs_in_turn.py"), str(file)]
    words = [f"name={name} {settings}" for name, settings in RUNS.items()]
    done = subprocess.run(
        [*command, str(folder / "ends.json"), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    ends = dict(zip(RUNS, json.loads((folder / "ends.json").read_text()), strict=True))
    return folder / "runs", ends, file
