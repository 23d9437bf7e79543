"""A process that trained ends in order, whatever threads of gloo still do, and with its exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.distributed
def test_a_collective_that_ends_during_the_end_aborts_nothing():
    torchrun = str(Path(sys.executable).parent / "torchrun")
    script = str(Path(__file__).parent / "late_collective.py")
    for seconds in ("0.3", "0.45", "0.6"):
        command = [torchrun, "--standalone", "--nproc-per-node=2", script, seconds]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        assert done.stdout.count("exit function of rank 0") == 1
        assert done.stdout.count("a thread's last words") == 2


def ended(code: str) -> subprocess.CompletedProcess[str]:
    program = f"import os, sys\nfrom spikescale.training.ending import end_process\n{code}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=buffered)


def test_the_exit_code_is_the_one_given_and_unflushed_output_arrives():
    done = ended("print('out', end=''); sys.stderr.write('err'); end_process(75)")
    assert (done.returncode, done.stdout, done.stderr) == (75, "out", "err")


def test_a_closed_output_is_told_by_the_exit_code_as_python_does():
    assert ended("print('lost'); os.close(1); end_process(0)").returncode == 120
    assert ended("print('lost'); os.close(1); end_process(3)").returncode == 3
