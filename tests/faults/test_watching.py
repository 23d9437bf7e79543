"""The watchdog, stop requests and the end of the launcher, each in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import SECONDS, alive, until

from spikescale.faults.exits import HUNG
from spikescale.faults.watchdog import Watchdog


def python(code: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-c", code, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out + err


def test_a_hang_leaves_every_threads_stack_and_a_code_of_its_own(tmp_path):
    codes, told = [], []
    barked = threading.Event()
    dog = Watchdog(
        0.3, 3, tmp_path, lambda phase, waited: told.append(phase), lambda c: (codes.append(c), barked.set())
    )
    dog.start()
    dog.step()
    assert barked.wait(SECONDS)
    assert codes == [HUNG]
    assert told == ["a step"]
    stacks = (tmp_path / "stacks-rank3.txt").read_text()
    assert stacks.startswith("rank 3: no progress for ")
    assert "test_a_hang_leaves_every_threads_stack_and_a_code_of_its_own" in stacks
    assert stacks.count("Thread 0x") + stacks.count("Current thread 0x") >= 2


def test_the_start_saves_and_evaluations_are_no_hang(tmp_path):
    codes = []
    dog = Watchdog(0.2, 0, tmp_path, end=codes.append).start()
    time.sleep(0.6)  # the start
    with dog.patience("saving"):
        dog.step()
        time.sleep(0.1)
    with dog.patience("saving"):
        time.sleep(0.6)
    for _ in range(6):
        time.sleep(0.1)
        dog.beat()
    dog.close()
    assert not codes
    assert not list(tmp_path.iterdir())


STOP = """
import sys, time
from spikescale.faults.stop import StopRequest
stop = StopRequest().install()
if sys.argv[1] == "training":
    stop.defer()
print("ready")
while stop.reason is None or sys.argv[1] == "stubborn":
    time.sleep(0.01)
print(stop.reason)
if len(sys.argv) > 2:
    time.sleep(600)
"""


def test_a_request_waits_for_the_loop_while_it_trains():
    process = python(STOP, "training")
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    assert read(process) == (0, "SIGUSR1\n")


def test_a_request_outside_of_training_ends_at_once_with_the_code_for_again():
    process = python(STOP, "starting")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    code, said = read(process)
    assert code == 75
    assert said == "stopped by SIGTERM; no step was lost\n"


def test_the_same_signal_again_ends_at_once_but_not_within_a_second():
    process = python(STOP, "training", "wait")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, said = read(process)
    assert code == 128 + signal.SIGTERM
    assert said == "a second SIGTERM: ended at once, without saving\n"


WATCHED = """
import os, subprocess, sys, time
from spikescale.faults.launcher import LauncherWatch
from spikescale.faults.stop import StopRequest
stop = StopRequest()
stop.defer()
LauncherWatch(stop, lambda: 0.0, deepspeed=sys.argv[1] == "deepspeed").start()
print(os.getpid(), flush=True)
while stop.reason is None:
    time.sleep(0.01)
open(sys.argv[2], "w").write(stop.reason)
"""
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


@pytest.mark.parametrize("helper", [False, True], ids=["launcher", "launcher's helper"])
def test_the_end_of_the_launcher_is_a_request_to_stop(helper, tmp_path):
    kind = "deepspeed" if helper else "other"
    words = [WATCHED, kind, str(tmp_path / "reason")]
    process = python(LAUNCHER, *([LAUNCHER, *words] if helper else words))
    rank = int(process.stdout.readline())
    time.sleep(1.2)
    assert alive(rank)
    assert not (tmp_path / "reason").exists()
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: (tmp_path / "reason").exists() and (tmp_path / "reason").read_text())
    assert Path(tmp_path / "reason").read_text() == "the end of its launcher"
    until(lambda: not alive(rank))
