"""The supervisor's decisions, on ranks that are a few lines of Python."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import alive, until

import spikescale.faults.supervisor as module
from spikescale.errors import UserError
from spikescale.faults.supervisor import Supervisor, _judge, _refuse_launchers

RANK = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
attempt = len(list(folder.glob(f"started-{rank}-*")))
facts = [os.environ["WORLD_SIZE"], str(os.getpid()), *sys.argv[2:]]
(folder / f"started-{rank}-{attempt}").write_text(" ".join(facts))
"""


@pytest.fixture
def supervise(tmp_path, monkeypatch):
    """Run ranks whose program is RANK and then `program`; (the supervisor, its lines)."""
    monkeypatch.setattr(module, "BACK_OFF_SECONDS", (0.05, 0.2))
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)

    def make(program: str, ranks: int = 2, max_restarts: int = 5):
        lines: list[str] = []
        command = [sys.executable, "-c", RANK + program, str(tmp_path)]
        return Supervisor(command, ranks, max_restarts, tmp_path, lines.append), lines

    return make


def starts(folder, rank=0):
    return len(list(folder.glob(f"started-{rank}-*")))


def test_ranks_that_end_well_are_started_once(supervise, tmp_path):
    supervisor, lines = supervise("")
    assert supervisor.run() == 0
    assert not lines
    assert (tmp_path / "started-1-0").read_text().startswith("2 ")


def test_a_killed_rank_takes_the_others_along_and_all_start_again_with_resume(supervise, tmp_path):
    supervisor, lines = supervise(
        "if attempt == 0 and rank == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if attempt == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)\n"
    )
    assert supervisor.run() == 0
    assert lines == [
        "rank 1 was ended by SIGKILL; restart 1 of 5 in 0 s from the beginning",
    ]
    assert not (tmp_path / "started-0-0").read_text().endswith("resume=auto")
    assert (tmp_path / "started-0-1").read_text().endswith("resume=auto")


@pytest.mark.parametrize("code", [2, 75, 130])
def test_final_codes_are_handed_on_without_a_restart(supervise, tmp_path, code):
    supervisor, lines = supervise(f"sys.exit({code})")
    assert supervisor.run() == code
    assert not lines
    assert starts(tmp_path) == 1


def test_a_crash_loop_without_a_new_checkpoint_is_given_up(supervise, tmp_path):
    supervisor, lines = supervise("sys.exit(1)", ranks=1, max_restarts=50)
    assert supervisor.run() == 1
    assert starts(tmp_path) == 3
    assert lines[-1] == (
        "error: rank 0 ended with code 1; 3 failures in a row without a new checkpoint: given up"
    )


def test_with_progress_it_goes_on_until_the_restarts_are_used_up(supervise, tmp_path):
    program = "(folder / 'checkpoints' / f'step-{attempt:08d}').mkdir(parents=True); sys.exit(76)"
    supervisor, lines = supervise(program, ranks=1, max_restarts=5)
    assert supervisor.run() == 76
    assert starts(tmp_path) == 6
    assert lines[0].endswith("restart 1 of 5 in 0 s from step-00000000")
    assert lines[-1] == "error: rank 0 ended with code 76; 5 restart(s) used up (--max-restarts)"


def test_signals_are_passed_on_and_nothing_is_started_again(supervise, tmp_path):
    supervisor, lines = supervise(
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))\n"
        "(folder / f'ready-{rank}').touch()\n"
        "time.sleep(600)\n"
    )
    thread = threading.Thread(
        target=lambda: (
            until(lambda: len(list(tmp_path.glob("ready-*"))) == 2),
            supervisor.pass_on(signal.SIGUSR1),
        )
    )
    thread.start()
    assert supervisor.run() == 1
    thread.join()
    assert starts(tmp_path) == 1
    assert not lines


def test_no_rank_outlives_a_killed_supervisor(tmp_path):
    program = (
        "import sys; from pathlib import Path; from spikescale.faults.supervisor import Supervisor;"
        "Supervisor([sys.executable, '-c', sys.argv[1], sys.argv[2]], 2, 0, Path(sys.argv[2])).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", program, RANK + "time.sleep(600)", str(tmp_path)])
    until(lambda: starts(tmp_path, 0) and starts(tmp_path, 1))
    time.sleep(0.2)
    ranks = [int((tmp_path / f"started-{rank}-0").read_text().split()[1]) for rank in (0, 1)]
    assert all(alive(rank) for rank in ranks)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not any(alive(rank) for rank in ranks))


@pytest.mark.parametrize(
    ("codes", "first", "expected"),
    [
        ([77, -9], (0, 77), (137, "rank 1 was ended by SIGKILL")),
        ([76, 77], (0, 76), (76, "rank 0 ended with code 76")),
        ([77, 2], (0, 77), (2, "rank 1 ended with code 2")),
        ([75, 75], (1, 75), (75, "rank 0 ended with code 75")),
        ([75, 77], (0, 75), (75, "rank 0 ended with code 75")),
        ([75, 1], (0, 75), (1, "rank 1 ended with code 1")),
        ([0, 1], (1, 1), (1, "rank 1 ended with code 1")),
        ([77, -15], (0, 77), (77, "rank 0 ended with code 77")),
    ],
)
def test_the_rank_to_blame_gives_the_code(codes, first, expected):
    assert _judge(codes, first) == expected


def test_launchers_are_refused_by_name():
    for environment in ({"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "2"}):
        with pytest.raises(UserError, match="torchrun --max-restarts N"):
            _refuse_launchers(environment)
    _refuse_launchers({"SLURM_STEP_NUM_TASKS": "1"})
