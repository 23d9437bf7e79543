"""Runs an ablation's pretrainings, each in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from spikescale.ablation.study import AblationRun
from spikescale.errors import UserError
from spikescale.faults.exits import DONE
from spikescale.tracking.metrics_file import read_metrics

POLL_SECONDS = 0.5
OUTPUT = "console.txt"  # in a run's folder: what its process said
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Watch = Callable[[AblationRun, int], None]  # told of a run and of the steps that it has made


def run_all(
    runs: Sequence[AblationRun],
    config: Path,
    seconds: float | None = None,
    watch: Watch | None = None,
    workers: int = 1,
) -> bool:
    """Run those that are not finished, `workers` at a time; whether all are finished now.

    After `seconds` (None: never), and at SIGTERM or Ctrl-C, the runs that are on save checkpoints, from which
    the same call goes on. Raises UserError with a run's last words when it fails.
    """
    end = None if seconds is None else time.monotonic() + seconds
    waiting = []
    for run in runs:
        if run.result() is None:
            waiting.append(run)
        elif watch is not None:
            watch(run, run.config.train.steps)
    active: list[tuple[AblationRun, subprocess.Popen[bytes]]] = []
    told = cut = False
    with _stop_asked() as stopped:
        try:
            while waiting or active:
                if stopped() or (end is not None and time.monotonic() >= end):
                    waiting.clear()
                    cut = True
                    if not told:
                        told = True  # once: a second SIGTERM would keep a run from saving
                        for _, process in active:
                            process.send_signal(signal.SIGTERM)
                while waiting and len(active) < workers:
                    run = waiting.pop(0)
                    active.append((run, _start(run, config)))
                for run, process in list(active):
                    if watch is not None:
                        watch(run, steps_made(run.folder))
                    if process.poll() is not None:
                        active.remove((run, process))
                        # Asked before it could listen, it ends by the signal itself.
                        if not _is_finished(run, process.returncode) and not told:
                            reason = f"the run ended with code {process.returncode}: {_last_words(run)}"
                            raise UserError(f"{run.folder}: {reason}")
                if active:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            for _, process in active:
                process.kill()
            raise
    return not cut or all(run.result() is not None for run in runs)


def _is_finished(run: AblationRun, code: int) -> bool:
    return code == DONE and run.result() is not None


def _start(run: AblationRun, config: Path) -> "subprocess.Popen[bytes]":
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "spikescale.training", "--config", str(config), *run.words]
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    with (run.folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )


def steps_made(folder: Path) -> int:
    """The last step that a run has recorded; 0 before the first."""
    try:
        return max((int(record["step"]) for record in read_metrics(folder / "metrics.jsonl")), default=0)
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT has come, which otherwise do nothing meanwhile."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_words(run: AblationRun) -> str:
    lines = (run.folder / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    said = (errors or lines or ["nothing was said"])[-1]
    return f"{said.removeprefix('error: ')} (all of it in {run.folder / OUTPUT})"
