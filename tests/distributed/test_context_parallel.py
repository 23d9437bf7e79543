"""Sequences divided over ranks: everything is as in one process, and nothing waits for ever."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from spikescale.config import RunConfig
from spikescale.parallel import Layout
from spikescale.parallel.context import part_of

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "training"))

from launching import TINY, launch, write_corpus  # noqa: E402

STEPS = 20
# Four ranks: two for the batch, two for each sequence, or four for each sequence; gradients are accumulated.
PARALLEL_RUNS = {
    "stage0": "zero.stage=0 parallel.context=2 train.micro_batch_size=2",
    "stage1": "zero.stage=1 parallel.context=2",
    "four-parts": "zero.stage=1 parallel.context=4 train.micro_batch_size=4"
    " train.activation_checkpointing=true",
}


def torchrun(script: str, ranks: int, words: list[str], timeout: int) -> None:
    """Run a script of this folder on several ranks. The scripts end themselves when they hang."""
    binary = str(Path(sys.executable).parent / "torchrun")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [binary, "--standalone", f"--nproc-per-node={ranks}", str(HERE / script), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # which torchrun passes on
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"{script} hung: {output[-3000:]}")
    assert process.returncode == 0, output[-6000:]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[dict]:
    """What differs between the ranks together and one process, for every case of context_cases.py."""
    output = tmp_path_factory.mktemp("cases") / "errors.json"
    torchrun("context_cases.py", 3, [str(output)], timeout=120)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of the runs of PARALLEL_RUNS, on four ranks, and of `single`, on one."""
    from spikescale.cli.main import main

    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "text")
    words = ["data", "prepare", "--source", str(folder / "text"), "--output", str(folder / "data")]
    assert main([*words, "--no-ray", "--tokenizer", "byte"]) == 0
    changes = {"steps": STEPS, "evaluate_every": 0, "save_every": 0, "sample_count": 0}
    content = {
        **TINY,
        "output": str(folder),
        "data": {"path": str(folder / "data")},
        "model": {"layers": 3, "width": 32, "context_length": 64},
        "train": TINY["train"] | changes,
    }
    run_file = folder / "run.yaml"
    run_file.write_text(json.dumps(content))
    launch(["--config", str(run_file), "name=single", "zero.stage=0"])
    words = [f"name={name} {settings}" for name, settings in PARALLEL_RUNS.items()]
    torchrun("context_training.py", 4, [str(run_file), *words], timeout=150)
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.distributed
def test_losses_and_every_gradient_are_those_of_one_process(cases):
    assert len(cases) > 20
    for case in cases:
        bound = 1e-12 if case["dtype"] == "float64" else 1e-5
        assert case["errors"]["loss"] < bound, case
        assert case["errors"]["gradient"] < bound, case


@pytest.mark.slow
@pytest.mark.distributed
def test_every_spike_is_that_of_one_process(cases):
    for case in cases:
        assert case["errors"]["spikes"] == 0, case
        assert case["errors"]["logits"] < (1e-12 if case["dtype"] == "float64" else 1e-5), case


@pytest.mark.slow
@pytest.mark.distributed
def test_the_last_rank_has_the_state_after_the_whole_sequence(cases):
    for case in cases:
        assert case["errors"]["state"] < (1e-12 if case["dtype"] == "float64" else 1e-5), case


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", PARALLEL_RUNS)
def test_pretraining_follows_the_single_process(runs, name):
    expected = [record for record in records(runs / "single") if "loss" in record]
    found = [record for record in records(runs / name) if "loss" in record]
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert [record["tokens"] for record in found] == [record["tokens"] for record in expected]
    for mine, reference in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], abs=1e-4)
        assert mine["gradient_norm"] == pytest.approx(reference["gradient_norm"], rel=1e-3)
        if name == "stage1":  # the others report the rates of a step's last micro-batch
            assert mine["firing_rates"] == pytest.approx(reference["firing_rates"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_validation_counts_every_token_once(runs):
    (expected,) = [record for record in records(runs / "single") if "valid_loss" in record]
    for name in PARALLEL_RUNS:
        (found,) = [record for record in records(runs / name) if "valid_loss" in record]
        assert found["valid_tokens"] == expected["valid_tokens"]
        assert found["valid_loss"] == pytest.approx(expected["valid_loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_benchmark_reports_one_process_and_every_rank(tmp_path):
    output = tmp_path / "result.json"
    script = HERE.parents[1] / "benchmarks" / "context_parallel.py"
    command = [sys.executable, str(script), "--quick", "--repeats", "2", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (rows,) = json.loads(output.read_text())["rows"].values()
    assert {ranks: len(row["peak_bytes"]) for ranks, row in rows.items()} == {"1": 1, "2": 2}
    assert rows["2"]["loss"] == pytest.approx(rows["1"]["loss"], rel=1e-3)
    assert all(row["median_seconds"] > 0 for row in rows.values())


def test_the_parts_of_a_sample_make_up_the_sample():
    sample = torch.arange(2 * 13).view(2, 13)
    parts = [part_of(sample, Layout(rank, 6, context=3)) for rank in range(3)]
    assert torch.equal(torch.cat([part[:, :-1] for part in parts], dim=1), sample[:, :-1])
    assert torch.equal(torch.cat([part[:, 1:] for part in parts], dim=1), sample[:, 1:])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"zero": {"stage": 2}}, "parallel.context does not work with zero.stage 2, .* use stage 1"),
        ({"zero": {"stage": 3}}, "parallel.context does not work with zero.stage 3, .* use stage 1"),
        ({"model": {"context_length": 63}}, "parallel.context = 2 does not divide model.context_length = 63"),
        (
            {"train": {"compile": True}},
            "train.compile does not work with parallel.tensor or parallel.context",
        ),
    ],
)
def test_what_context_parallelism_cannot_do_is_refused(changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        RunConfig.model_validate(
            {"data": {"path": Path("data")}, "parallel": {"context": 2}, **changes}, strict=True
        )
