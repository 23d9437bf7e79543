"""Plans run on Ray: every run once, interrupted ones resumed, failed ones tried again and marked."""

import json
import os
import re
import signal
import subprocess

import pytest

from spikescale.cli.main import main
from spikescale.config import load_config
from spikescale.data_pipeline.pools import ray_running
from spikescale.errors import UserError
from spikescale.faults.events import append_event
from spikescale.faults.exits import REQUEUE
from spikescale.scaling import child
from spikescale.scaling.energy_of_runs import energy_of_runs
from spikescale.scaling.outcomes import points_of_plan
from spikescale.scaling.plan_file import Plan, PlannedRun, write_plan
from spikescale.scaling.points import final_points, read_points
from spikescale.scaling.scheduler import Resources, State, run_plan, status_of
from spikescale.scaling.slurm import CONFIG, SUBMIT, write_arrays, write_config


def planned(name, steps, kind="run", **more):
    trained = steps - more.get("branch_step", 0)
    return PlannedRun(
        name=name,
        kind=kind,
        family="spikegpt",
        layers=2,
        width=32,
        parameters=46000,
        parameters_non_embedding=30000,
        flop_per_token=200000,
        tokens=steps * 256,
        steps=steps,
        lr=5e-3,
        flop=200000.0 * steps * 256,
        cost_flop=200000.0 * trained * 256,
        seconds=float(trained),
        **more,
    )


@pytest.fixture
def plan(tmp_path, prepared_data):
    """A run of 12 steps, and the same twice more: in two lengths from one trunk."""
    return Plan(
        name="small",
        design="branches",
        device="cpu",
        train_tokens=50000,
        vocab_size=257,
        min_lr_share=0.1,
        decay_fraction=0.25,
        base={
            "output": str(tmp_path / "runs"),
            "data": {"path": str(prepared_data), "verify": "size"},
            "model": {"context_length": 32, "width_transfer": 16},
            "train": {
                "steps": 1000,
                "batch_size": 8,
                "warmup_steps": 2,
                "lr": 5e-3,
                "min_lr": 0.0,
                "log_every": 1,
                "evaluate_every": 0,
                "evaluate_tokens": 1000,
                "final_evaluation_tokens": 100,
                "save_every": 0,
                "sample_count": 0,
            },
            "mlflow": {"enabled": False},
        },
        runs=(
            planned("trunk", 9, "trunk", save_at=(6, 9)),
            planned("short", 8, "branch", branch_from="trunk", branch_step=6),
            planned("long", 12, "branch", branch_from="trunk", branch_step=9),
            planned("whole", 12),
        ),
    )


def losses(plan, name):
    lines = (plan.output / name / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}


@pytest.mark.slow
@pytest.mark.distributed
def test_every_run_of_a_plan_is_done_once_whatever_happens_to_it(plan, tmp_path):
    config = write_config(plan, plan.output / CONFIG)
    state = State.read(plan.output / "state.json")
    names = [run.name for run in plan.runs]
    resources = Resources(slots=2)
    with ray_running(2):
        # Killed in its third step, and no retry: marked, and so are its branches.
        status = run_plan(plan, config, state, resources, ["trunk"], 0, ["faults.inject=kill@3"])
        assert status == {"trunk": "failed", "short": "blocked", "long": "blocked", "whole": "open"}
        assert State.read(state.path).failures["trunk"] == state.failures["trunk"]
        assert len(state.failures["trunk"]) == 1
        # With a retry it goes on. The whole run is killed and tried again, then stopped and resumed.
        status = run_plan(plan, config, state, resources, ["trunk", "long"], 1)
        assert status == {"trunk": "finished", "short": "open", "long": "finished", "whole": "open"}
        status = run_plan(plan, config, state, resources, ["whole"], 1, ["faults.inject=kill@3;sigterm@5"])
        assert status == {"trunk": "finished", "short": "open", "long": "finished", "whole": "finished"}
        assert {name: len(lines) for name, lines in state.failures.items()} == {"trunk": 1, "whole": 1}
    console = (plan.output / "whole" / "console.txt").read_text()
    # The signal of step 5 is seen at the end of that step, or of a later one; on a busy machine of the last.
    assert all(int(step) >= 5 for step in re.findall(r"resumed at step (\d+)", console)), console
    # A branch is the whole run, bit for bit.
    assert list(losses(plan, "long")) == [10, 11, 12]
    whole = losses(plan, "whole")
    assert losses(plan, "long") == {step: whole[step] for step in (10, 11, 12)}
    assert losses(plan, "trunk") == {step: whole[step] for step in range(1, 10)}
    finals = final_points(points_of_plan(plan))
    assert {point.run: point.tokens for point in finals} == {"long": 3072, "whole": 3072}
    assert len({point.loss for point in finals if point.tokens == 3072}) == 1
    assert all(0 < point.firing_rate < 1 for point in finals)
    # Done is done: nothing is started again, not even Ray.
    names.remove("short")
    before = {name: (plan.output / name / "metrics.jsonl").stat().st_mtime_ns for name in names}
    run_plan(plan, config, state, resources, names)
    assert before == {name: (plan.output / name / "metrics.jsonl").stat().st_mtime_ns for name in names}


def test_plan_as_job_arrays_names_every_open_run(plan, tmp_path):
    runs = [run for run in plan.runs if run.name != "whole"]
    script = write_arrays(plan, runs, tmp_path / "jobs", 3, gpus=True, extra=["train.threads=2"])
    lines = (tmp_path / "jobs" / "stage-1-ranks-1.txt").read_text().splitlines()
    lines += (tmp_path / "jobs" / "stage-2-ranks-1.txt").read_text().splitlines()
    configs = [load_config(tmp_path / "jobs" / CONFIG, line.split(" ")) for line in lines]
    assert [config.name for config in configs] == ["trunk", "short", "long"]
    assert configs[0].train.save_at == (6, 9)
    assert configs[1].branch_from == plan.output / "trunk" / "checkpoints" / "step-00000006"
    assert all(config.train.threads == 2 for config in configs)
    # What the script hands to sbatch.
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "$@" >>calls.txt\necho 41\n')
    (tmp_path / "sbatch").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PROJECT": str(tmp_path)}
    subprocess.run(["bash", str(script), "--partition=x"], check=True, env=environment, capture_output=True)
    first, second = (tmp_path / "calls.txt").read_text().splitlines()
    assert (
        "--array=1-1%3 --ntasks-per-node=1 --gpus-per-node=1 --partition=x launch/slurm/sweep.sbatch" in first
    )
    assert "--array=1-2%3" in second
    assert "--dependency=afterany:41" in second
    assert script.name == SUBMIT


def test_status_of_a_plan_that_was_never_started(plan, tmp_path):
    state = State.read(tmp_path / "none.json")
    assert set(status_of(plan, state, 1).values()) == {"open"}


def test_collecting_reads_what_runs_left_without_starting_any(plan, tmp_path, capsys):
    write_plan(plan, tmp_path / "plan.json")
    for name, step, ended in (("whole", 12, True), ("trunk", 9, True), ("long", 10, False)):
        folder = plan.output / name
        folder.mkdir(parents=True)
        records = [
            {"step": 2, "valid_loss": 9.0, "valid_tokens": 100},  # of another text: left out
            {"step": 3, "firing_rate": 0.25},
            {"step": step, "valid_loss": 2.5, "valid_tokens": 1000},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if ended:
            append_event(folder, "end", step)
    assert main(["scaling", "run", str(tmp_path / "plan.json"), "--collect"]) == 75
    assert "small: 2 finished, 2 open" in capsys.readouterr().out
    trunk, unfinished, whole = sorted(read_points([plan.output / "points.csv"]), key=lambda p: p.tokens)
    assert (whole.tokens, whole.loss, whole.firing_rate, whole.final) == (3072, 2.5, 0.25, True)
    assert (trunk.tokens, trunk.run, trunk.final) == (2304, "trunk", False)
    assert (unfinished.run, unfinished.final) == ("long", False)
    assert whole.flop == 200000 * 3072


class Stopped:
    """Stands for a child that a signal ends after it was told to stop."""

    def __init__(self, *_):
        self.ended = None

    def code(self):
        return self.ended

    def terminate(self):
        self.ended = -signal.SIGTERM


def test_a_child_told_to_stop_before_it_can_save_is_to_go_on_and_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(child, "_Forked", Stopped)
    monkeypatch.setattr(child, "POLL_SECONDS", 0.0)
    asked = iter([False, False, True])
    assert child.run_to_end(tmp_path, [], tmp_path / "a", 1, lambda: next(asked))[0] == REQUEUE

    def refuse(*_):
        pytest.fail("started although it was to stop")

    monkeypatch.setattr(child, "_Forked", refuse)
    assert child.run_to_end(tmp_path, [], tmp_path / "b", 1, lambda: True)[0] == REQUEUE


def test_a_signal_from_elsewhere_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(child, "_Forked", Stopped)
    monkeypatch.setattr(Stopped, "code", lambda self: -signal.SIGTERM)
    assert child.run_to_end(tmp_path, [], tmp_path, 1, lambda: False)[0] == -signal.SIGTERM


def test_energy_leaves_out_removed_checkpoints_aloud_and_refuses_damaged_ones(plan, capsys):
    folder = plan.folder(plan.runs[-1])
    folder.mkdir(parents=True)
    append_event(folder, "end", 12)
    assert energy_of_runs(plan, ["spikegpt"], "total", 16) == {}
    assert "no energy of whole: its checkpoints were removed" in capsys.readouterr().err
    (folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no model found"):
        energy_of_runs(plan, ["spikegpt"], "total", 16)
