"""Ranks that are killed, stopped or hang: the curve is the undisturbed one's, bit for bit."""

import os
import signal
import time

import pytest
from processes import alive, children, end, events, records, run, start, until
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SUPERVISED = ["--ranks", "2", "--max-restarts", "5"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, make_run_file):
    """The folder of a run of two ranks to which nothing happened, and its run file."""
    folder = tmp_path_factory.mktemp("restarts")
    file = make_run_file(folder)
    run([*SUPERVISED, "--config", str(file), "name=whole"])
    whole = folder / "runs" / "whole"
    assert len([record for record in records(whole) if "loss" in record]) == 12
    assert not events(whole, "restart")
    return whole, file


def assert_equal_runs(folder, whole):
    assert records(folder) == records(whole)
    last = "checkpoints/step-00000012/model/model.safetensors"
    weights, expected = load_file(folder / last), load_file(whole / last)
    assert all((weights[name] == expected[name]).all() for name in expected)


def test_killed_and_hanging_ranks_are_started_again_and_nothing_changes(undisturbed):
    whole, file = undisturbed
    faults = "kill@6:rank1;kill-save@8:rank0;hang@10:rank1"
    words = ["--config", str(file), "name=killed", f"faults.inject={faults}", "faults.hang_seconds=5"]
    _, err = run([*SUPERVISED, *words])
    folder = whole.parent / "killed"
    assert_equal_runs(folder, whole)
    restarts = [(event["number"], event["code"], event["from"]) for event in events(folder, "restart")]
    assert restarts == [
        (1, 137, "step-00000004"),  # in the middle of step 6
        (2, 137, "step-00000004"),  # in the middle of saving step 8
        (3, 76, "step-00000008"),  # in step 10
    ]
    assert "rank 1 was ended by SIGKILL; restart 1 of 5 in 1 s from step-00000004" in err
    assert "within_step" in (folder / "stacks-rank1.txt").read_text()
    assert "all_reduce" in (folder / "stacks-rank0.txt").read_text()
    assert not list((folder / "checkpoints").glob(".tmp-*"))


def test_stops_by_a_signal_and_by_the_end_of_the_launcher_lose_nothing(undisturbed):
    whole, file = undisturbed
    folder = whole.parent / "stopped"
    words = ["--config", str(file), "name=stopped"]
    faults = "faults.inject=kill@3:rank1;sigusr1@5:rank1;pause@7"

    # torchrun starts the ranks again after the kill; the stop is one more failure to it, and one too many.
    run([*words, faults], "torchrun", ranks=2, code=1)
    assert [event["step"] for event in events(folder, "start")] == [0, 0]
    (stop,) = events(folder, "stop")
    assert stop["step"] in (5, 6)  # a thread takes the signal up, possibly when step 5 has been agreed on
    assert (stop["saved"], stop["reason"]) == (stop["step"], "SIGUSR1")
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step-{stop['step']:08d}"

    # A supervisor that is killed takes its ranks along: they end by themselves after a step and a save.
    supervisor = start([*SUPERVISED, *words, faults])
    until(lambda: (folder / "injected" / "pause@7-rank0").exists())
    ranks = children(supervisor.pid)
    assert len(ranks) == 2
    supervisor.kill()
    until(lambda: not alive(supervisor.pid))
    time.sleep(0.5)  # for the ranks' threads, so that the request counts in this step
    (folder / "continue").touch()
    until(lambda: not any(alive(rank) for rank in ranks))
    end(supervisor)
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step-00000007"

    # SIGTERM to the supervisor: the ranks save and say so in one line, and its code is theirs.
    supervisor = start([*SUPERVISED, *words, f"{faults};pause@9:rank1"])
    until(lambda: (folder / "injected" / "pause@9-rank1").exists())
    os.kill(supervisor.pid, signal.SIGTERM)
    time.sleep(0.5)
    (folder / "continue").touch()
    code, _, err = end(supervisor)
    assert code == 75
    assert err.count("stopped by SIGTERM") == 1
    assert events(folder, "start")[-1]["step"] == 7
    last = events(folder, "stop")[-1]["step"]
    assert last >= 9
    assert records(folder) == [record for record in records(whole) if record["step"] <= last]
