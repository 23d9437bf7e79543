"""launch/slurm on a real SLURM of two nodes: runs, requeues, gives up and sweeps as its comments say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hosts import wait_for
from launching import ROOT, TINY, losses
from needs import require_programs
from safetensors.torch import load_file
from slurm_cluster import NEEDED, SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PRETRAIN = str(ROOT / "launch" / "slurm" / "pretrain.sbatch")
SWEEP = str(ROOT / "launch" / "slurm" / "sweep.sbatch")
STEPS = 100

# Stands for the interpreter where only the scripts' own behaviour is asked for, which takes no training.
STAND_IN = """#!/bin/bash
echo "rank $SLURM_PROCID of $SLURM_NTASKS, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
case "$BEHAVIOUR" in
crash) if [ "$SLURM_PROCID" = 1 ]; then exit 1; fi; sleep 60 ;;
refuse) if [ "$SLURM_PROCID" = 0 ]; then exit 2; fi; sleep 60 ;;
save)
    trap 'exit 75' TERM USR1
    if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then for _ in $(seq 600); do sleep 0.1; done; fi
    ;;
esac
"""


def logged_steps(folder):
    """How many steps a run that is still going has written down."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


class Jobs:
    """Submitting launch/slurm's scripts to the cluster from one folder."""

    def __init__(self, cluster, folder, environment):
        self.cluster, self.folder, self.environment = cluster, folder, environment
        self.stand_in = folder / "python"
        self.stand_in.write_text(STAND_IN)
        self.stand_in.chmod(0o755)

    def log(self, name):
        return self.folder / f"{name}.log"

    def text(self, name):
        return self.log(name).read_text() if self.log(name).exists() else ""

    def submit(self, name, script, words, options=(), log=None, **variables):
        environment = {**self.environment, "PROJECT": str(ROOT), "PYTHON": sys.executable}
        environment["OUTCOMES"] = str(self.folder / "outcomes")
        given = ["--job-name", name, "--output", str(self.folder / (log or f"{name}.log")), *options]
        return self.cluster.submit([*given, script, *words], self.folder, **{**environment, **variables})

    def behave(self, behaviour, name, options=(), **variables):
        """Submit a job of two ranks that do not train but behave in one way."""
        options = ["--nodes", "2", *options]
        variables |= {"PYTHON": str(self.stand_in), "BEHAVIOUR": behaviour}
        return self.submit(name, PRETRAIN, ["name=any"], options, **variables)

    def end(self, number, name):
        job = self.cluster.wait_for_end(number, self.log(name))
        return job["JobState"], int(job["Restarts"]), self.text(name)


@pytest.fixture(scope="module")
def jobs(two_hosts, host_environment, tmp_path_factory):
    """The cluster and a folder that its nodes share."""
    require_programs(NEEDED)
    return Jobs(SlurmCluster(two_hosts), tmp_path_factory.mktemp("slurm"), host_environment)


@pytest.fixture(scope="module")
def run_file(jobs, small_data):
    """A run of seconds whose files go to the shared folder."""
    path = jobs.folder / "run.yaml"
    train = {**TINY["train"], "steps": STEPS, "evaluate_every": 0, "save_every": 0, "sample_count": 0}
    content = {**TINY, "train": train, "output": str(jobs.folder / "runs"), "data": {"path": str(small_data)}}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def submitted(jobs, run_file):
    """Numbers of the jobs that need nobody's help, all in the queue at once: most of them only wait."""
    (jobs.folder / "rates.txt").write_text("train.lr=2e-3\ntrain.lr=4e-3 zero.stage=0\n")
    train = ["--config", str(run_file)]
    whole = [*train, "model.dropout=0.1", "name=undisturbed"]
    # SLURM signals up to half a minute early; a minute is the shortest time there is.
    minute = ["--time", "1", "--signal", "USR1@30"]
    return {
        "undisturbed": jobs.submit("undisturbed", PRETRAIN, whole, ["--nodes", "2"]),
        "out-of-time": jobs.behave("save", "out-of-time", minute),
        "crash": jobs.behave("crash", "crash", MAX_FAILURES="2"),
        "refuse": jobs.behave("refuse", "refuse"),
        "sweep": jobs.submit("sweep", SWEEP, ["rates.txt", *train], ["--array", "1-2"], "sweep-%a.log"),
    }


def test_sweep_trains_each_line_and_requeues_only_the_element_that_asked(submitted, jobs):
    array = submitted["sweep"]
    first, second = (jobs.folder / "runs" / f"rates-{element}" for element in (1, 2))
    wait_for(lambda: logged_steps(second) >= 5, 400, "5 steps")
    # The last element's own number is the whole array's, which must not be requeued with it.
    element = f"{array}_2"
    assert jobs.cluster.job(element)["JobId"] == array
    for signal in ("STOP", "USR1", "CONT"):  # held still, it cannot end before the signal arrives
        jobs.cluster.run(["scancel", f"--signal={signal}", element])
    assert jobs.end(element, "sweep-2")[:2] == ("COMPLETED", 1)
    assert jobs.end(f"{array}_1", "sweep-1")[:2] == ("COMPLETED", 0)
    settings = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second)]
    assert [(one["train"]["lr"], one["zero"]["stage"]) for one in settings] == [(2e-3, 1), (4e-3, 0)]
    assert list(losses(first)) == list(losses(second)) == list(range(1, STEPS + 1))
    assert losses(first)[STEPS] != losses(second)[STEPS]


def test_unforeseen_failure_is_tried_again_until_the_limit(submitted, jobs):
    state, restarts, log = jobs.end(submitted["crash"], "crash")
    assert (state, restarts) == ("FAILED", 1)
    assert "goes back into the queue: failure 1" in log
    assert "rank 1 of 2, start 2: launch/pretrain.py name=any" in log
    assert "start 3" not in log


def test_bad_input_is_not_tried_again(submitted, jobs):
    number = submitted["refuse"]
    state, restarts, log = jobs.end(number, "refuse")
    assert (state, restarts) == ("FAILED", 0)
    assert jobs.cluster.job(number)["ExitCode"] == "2:0"  # although srun reports how it ended the other rank
    assert "start 2" not in log


def test_cancelled_job_stays_cancelled_though_it_saved(submitted, jobs):
    number = jobs.behave("save", "cancelled")
    wait_for(lambda: jobs.text("cancelled").count("of 2, start 1") == 2, 120, "both ranks of the job")
    jobs.cluster.run(["scancel", number])
    state, restarts, log = jobs.end(number, "cancelled")
    assert (state, restarts) == ("CANCELLED", 0)
    assert "start 2" not in log
    assert [path.read_text() for path in (jobs.folder / "outcomes" / number).iterdir()] == ["75\n", "75\n"]


def test_job_whose_time_runs_out_saves_and_goes_back_into_the_queue(submitted, jobs):
    state, restarts, log = jobs.end(submitted["out-of-time"], "out-of-time")
    assert (state, restarts) == ("COMPLETED", 1)
    assert "goes back into the queue: its state is saved" in log
    assert log.count("of 2, start 2") == 2


def test_preempted_run_continues_bit_for_bit(submitted, jobs, run_file):
    assert jobs.end(submitted["undisturbed"], "undisturbed")[:2] == ("COMPLETED", 0)
    whole, part = (jobs.folder / "runs" / name for name in ("undisturbed", "preempted"))
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    words = ["--config", str(run_file), "model.dropout=0.1", "name=preempted"]
    number = jobs.submit("preempted", PRETRAIN, words, ["--nodes", "2"])
    wait_for(lambda: logged_steps(part) >= 5, 400, "5 steps")
    # Held still, it cannot end before it is preempted, which first sends SIGCONT.
    jobs.cluster.run(["scancel", "--signal=STOP", number])
    # A job that wants both nodes whole, in the partition that goes first.
    wanted = ["--partition", "high", "--nodes", "2", "--exclusive", "--output", str(jobs.log("urgent"))]
    urgent = jobs.cluster.submit([*wanted, "--wrap", "srun hostname"], jobs.folder)
    assert jobs.end(urgent, "urgent")[:2] == ("COMPLETED", 0)
    assert sorted(jobs.text("urgent").split()) == ["node1", "node2"]
    assert logged_steps(part) < STEPS  # it ran before the end of the other
    state, restarts, log = jobs.end(number, "preempted")
    assert (state, restarts) == ("COMPLETED", 1)
    assert "goes back into the queue: its state is saved" in log
    assert "resumed at step" in log
    assert losses(part) == losses(whole)
    last = f"checkpoints/step-{STEPS:08}/model/model.safetensors"
    weights, resumed = load_file(whole / last), load_file(part / last)
    assert all((weights[name] == resumed[name]).all() for name in weights)


def test_sweep_without_a_line_for_an_element_says_so(jobs):
    (jobs.folder / "one.txt").write_text("train.lr=2e-3\n")
    array = jobs.submit("short", SWEEP, ["one.txt"], ["--array", "2"], "short.log")
    state, _, log = jobs.end(f"{array}_2", "short")
    assert state == "FAILED"
    assert "error: one.txt has no settings in line 2; --array must be 1-1" in log


def test_scripts_refuse_to_run_outside_slurm(tmp_path):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    for script, complaint in ((PRETRAIN, "submit this file with sbatch"), (SWEEP, "no array or no file")):
        done = subprocess.run(["bash", script], capture_output=True, text=True, env=clean, cwd=tmp_path)
        assert done.returncode != 0 and complaint in done.stderr


def test_log_names_match_what_the_comments_promise():
    for script, name in ((PRETRAIN, "%x-%j.log"), (SWEEP, "%x-%A_%a.log")):
        text = Path(script).read_text()
        for option in (f"--output={name}", "--open-mode=append", "--requeue", "--signal=USR1@120"):
            assert f"#SBATCH {option}\n" in text
