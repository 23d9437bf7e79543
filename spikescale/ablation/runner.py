"""Runs an ablation's pretrainings one after another, each in a process of its own."""

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
from spikescale.faults.exits import DONE, REQUEUE
from spikescale.tracking.metrics_file import read_metrics

POLL_SECONDS = 0.5
OUTPUT = "console.txt"  # in a run's folder: what its process said
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Watch = Callable[[AblationRun, int], None]  # told of a run and of the steps that it has made


def run_all(
    runs: Sequence[AblationRun], config: Path, seconds: float | None = None, watch: Watch | None = None
) -> bool:
    """Run those that are not finished; whether all are finished now.

    After `seconds` (None: never), and at SIGTERM or Ctrl-C, the run that is on saves a checkpoint, from which
    the same call goes on. Raises UserError with the run's last words when one fails.
    """
    end = None if seconds is None else time.monotonic() + seconds
    with _stop_asked() as stopped:
        for run in runs:
            if run.result() is not None:
                if watch is not None:
                    watch(run, run.config.train.steps)
                continue
            if stopped() or (end is not None and time.monotonic() >= end):
                return False
            code = _run_one(run, config, end, stopped, watch)
            if code == REQUEUE:
                return False
            if code != DONE or run.result() is None:
                raise UserError(f"{run.folder}: the run ended with code {code}: {_last_words(run)}")
    return True


def _run_one(
    run: AblationRun,
    config: Path,
    end: float | None,
    stopped: Callable[[], bool],
    watch: Watch | None,
) -> int:
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "spikescale.training", "--config", str(config), *run.words]
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    with (run.folder / OUTPUT).open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            told = False
            while process.poll() is None:
                if not told and (stopped() or (end is not None and time.monotonic() >= end)):
                    told = True  # once: a second SIGTERM would keep it from saving
                    process.send_signal(signal.SIGTERM)
                if watch is not None:
                    watch(run, steps_made(run.folder))
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.kill()
            raise
    # Asked before it could listen, it ends by the signal itself.
    return REQUEUE if told and process.returncode != DONE else process.returncode


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
