"""Training while the data are made: the same curve, to the bit, as on the finished data set."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT, TINY, launch, write_corpus

from spikescale.data_pipeline.manifest import load_manifest
from spikescale.tracking.metrics_file import read_metrics

SAME = ("loss", "gradient_norm", "lr", "tokens", "firing_rate", "valid_loss")
PREPARE = ["data", "prepare", "--tokenizer", "byte", "--no-ray", "--quiet", "--partition-mib", "0.0025"]
PREPARE += ["--valid-fraction", "0.15"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sixty documents, which make about twenty shards."""
    write_corpus(tmp_path / "text")
    return tmp_path / "text"


def run_file(folder: Path, name: str, data: dict, **train: object) -> Path:
    content = {"name": name, "output": str(folder / "runs"), **TINY, "data": data}
    content["train"] = {**TINY["train"], "steps": 24, "evaluate_tokens": 600, **train}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))
    return path


def streaming(folder: Path, corpus: Path, **stream: object) -> dict:
    settings = {
        "source": [str(corpus)],
        "partition_mib": 0.0025,
        "ray": "none",
        "valid_fraction": 0.15,
        **stream,
    }
    return {"path": str(folder / "live"), "mode": "streaming", "shuffle_window": 3, "stream": settings}


def prepare(folder: Path, corpus: Path) -> dict:
    from spikescale.cli.main import main

    assert main([*PREPARE, "--source", str(corpus), "--output", str(folder / "finished")]) == 0
    return {"path": str(folder / "finished"), "shuffle_window": 3}


def curve(folder: Path, name: str) -> list[dict]:
    records = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [{key: record[key] for key in SAME if key in record} for record in records]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_curve_is_that_of_the_finished_data_to_the_bit(tmp_path: Path, corpus: Path) -> None:
    """On two ranks, with Ray and a look-ahead of one shard, over more than an epoch (47 steps)."""
    finished = prepare(tmp_path, corpus)
    settings = {"steps": 60, "batch_size": 32, "log_every": 5, "evaluate_every": 30, "save_every": 30}
    live = streaming(tmp_path, corpus, ray="local", workers=2, look_ahead_shards=1)
    done = launch(["--config", str(run_file(tmp_path, "live", live, **settings))], "torchrun", 2)
    assert "shards that are made while they are read" in done.stdout
    launch(["--config", str(run_file(tmp_path, "finished", finished, **settings))], "torchrun", 2)
    assert curve(tmp_path, "live") == curve(tmp_path, "finished")
    made, whole = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}
        for folder in (tmp_path / "live", tmp_path / "finished")
    )
    assert made == whole and len(made) > 50
    records = read_metrics(tmp_path / "runs" / "live" / "metrics.jsonl")
    assert all(0 <= record["data_wait_share"] < 1 for record in records if "data_wait_share" in record)
    # The next run finds everything made.
    again = launch(["--config", str(run_file(tmp_path, "again", live, **{**settings, "steps": 8}))])
    assert "documents to train on" in again.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_is_stopped_goes_on_live_and_then_finished(tmp_path: Path, corpus: Path) -> None:
    finished = prepare(tmp_path, corpus)
    settings = {"steps": 24, "log_every": 1, "save_every": 8}
    launch(["--config", str(run_file(tmp_path, "finished", finished, **settings))])
    live = streaming(tmp_path, corpus, look_ahead_shards=3)
    path = run_file(tmp_path, "live", live, **settings)
    stopped = launch(["--config", str(path), "faults.inject=kill@11"], check=False)
    assert stopped.returncode == -signal.SIGKILL
    shards = len(list((tmp_path / "live").glob("train-*.bin")))
    assert 0 < shards < len(list((tmp_path / "finished").glob("train-*.bin")))  # it did not run ahead
    assert "resumed at step 8" in launch(["--config", str(path), "train.steps=24"]).stdout
    assert curve(tmp_path, "live") == curve(tmp_path, "finished")
    # A checkpoint of the live data is good for the finished ones: same order, by the same request.
    from spikescale.cli.main import main

    assert main([*PREPARE, "--source", str(corpus), "--output", str(tmp_path / "live")]) == 0
    content = json.loads(path.read_text())
    content["data"] = {"path": str(tmp_path / "live"), "shuffle_window": 3}
    content["train"]["steps"] = 26
    path.write_text(json.dumps(content))
    assert "resumed at step 24" in launch(["--config", str(path)]).stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_a_producer_that_is_killed_is_started_again(tmp_path: Path, corpus: Path) -> None:
    finished = prepare(tmp_path, corpus)
    settings = {"steps": 48, "batch_size": 32, "log_every": 4, "evaluate_every": 24, "save_every": 24}
    launch(["--config", str(run_file(tmp_path, "finished", finished, **settings))])
    live = streaming(tmp_path, corpus, look_ahead_shards=1)
    path = run_file(tmp_path, "live", live, **settings)
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as run:
        killed = 0
        while run.poll() is None and killed < 2:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(run.pid).children():
                    made = len(list((tmp_path / "live").glob("test-*.json")))
                    if "spikescale.data_pipeline.producer" in child.cmdline() and made > 4 * killed:
                        child.kill()
                        killed += 1
            time.sleep(0.05)
        assert run.wait(timeout=200) == 0 and killed == 2
    assert curve(tmp_path, "live") == curve(tmp_path, "finished")


@pytest.mark.slow
@pytest.mark.distributed
def test_text_that_turns_out_bad_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {number} " + "word " * 60, "kind": "x"}) for number in range(200)]
    lines[180] = "{not json"
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    live = streaming(tmp_path, tmp_path / "corpus.jsonl", look_ahead_shards=1)
    path = run_file(tmp_path, "live", live, steps=400, save_every=4, evaluate_every=100, log_every=4)
    done = launch(["--config", str(path)], "torchrun", 2, check=False)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "corpus.jsonl, line 181" in line]
    assert len(said) == 1 and "not valid JSON" in said[0]
    assert list((tmp_path / "runs" / "live" / "checkpoints").glob("step-*"))
    # With a quarantine the same text is trained on, with conditions from its keys in front.
    live = streaming(
        tmp_path,
        tmp_path / "corpus.jsonl",
        bad_records="quarantine",
        max_bad_share=0.5,
        condition_on=["kind"],
        look_ahead_shards=100,
    )
    live["path"] = str(tmp_path / "second")
    launch(["--config", str(run_file(tmp_path, "second", live, steps=400, save_every=0, evaluate_every=0))])
    bad = [json.loads(line) for path in (tmp_path / "second").glob("quarantine-*") for line in path.open()]
    assert [record["line"] for record in bad if "line" in record] and len(bad) == 1
    assert load_manifest(tmp_path / "second").tokenizer.vocab_size == 257
