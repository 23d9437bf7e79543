"""Starting launch/pretrain.py without waiting for it, and reading what its run has left."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launching import launch_command

from spikescale.faults.events import read_events

SECONDS = 180.0  # that anything is waited for at most
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(words: list[str], launcher: str = "python", ranks: int = 1) -> subprocess.Popen[str]:
    """Start a run under python (supervised with `--ranks` among the words), deepspeed or torchrun."""
    binaries = Path(sys.executable).parent
    command = launch_command(launcher, ranks, "--max-restarts=1", "--monitor-interval=0.1")
    environment = {name: value for name, value in os.environ.items() if name not in PLACES}
    environment |= {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        command + words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the process; its code, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def run(words: list[str], launcher: str = "python", ranks: int = 1, code: int = 0) -> tuple[str, str]:
    """Run to the end, which must be `code`; standard output and error."""
    found, out, err = end(start(words, launcher, ranks))
    assert found == code, f"code {found}\n{out[-3000:]}\n{err[-6000:]}"
    return out, err


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without what depends on the machine's speed."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    hidden = ("tokens_per_second", "flops_per_second", "peak_share", "data_wait_share")
    # Rates are taken over the last logged steps of the same process.
    hidden += ("dead_neurons", "saturated_neurons")
    return [{k: v for k, v in json.loads(line).items() if k not in hidden} for line in lines]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind, oldest first."""
    return [event for event in read_events(folder) if event["event"] == kind]


def children(process: int) -> list[int]:
    """Process ids of the children of a process."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                stat = (path / "stat").read_text(encoding="utf-8")
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == process:
                found.append(int(path.name))
    return found


def alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
