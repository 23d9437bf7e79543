"""One training run as a process of its own, started quickly and watched.

A run of one rank is forked from a server that has imported torch, DeepSpeed and MLflow once: a small run
takes seconds, and so would its imports. A run of several ranks is started by launch/pretrain.py --ranks.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import spikescale
from spikescale.errors import UserError
from spikescale.faults.exits import REQUEUE
from spikescale.faults.launcher import SUPERVISED

PRELOADED = (
    "torch",
    "torch._dynamo",
    "deepspeed",
    "mlflow.tracking",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "spikescale.training.pretrain",
)
POLL_SECONDS = 0.2
CONSOLE = "console.txt"  # in the run's folder: all that its processes said
TAIL = 2000  # bytes of it that a failure is reported with
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch_script() -> Path:
    """launch/pretrain.py of the source tree this package runs from. Raises UserError without one."""
    script = Path(spikescale.__file__).resolve().parents[1] / "launch" / "pretrain.py"
    if not script.is_file():
        raise UserError(f"{script}: not found; runs of several ranks need the source tree (pip install -e)")
    return script


def run_to_end(
    config: Path, settings: Sequence[str], folder: Path, ranks: int, stop: Callable[[], bool]
) -> tuple[int, str]:
    """Train as launch/pretrain.py does with these words; (exit code, the end of what it said if it failed).

    stop: asked often; once it is true the run is told to save and to end, with code 75. A run that is not to
    start at all, or is told before it can save (its imports take seconds), ends with that code too.
    """
    if stop():
        return REQUEUE, ""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--config", str(config), *settings]
    process: _Child = _Ranks(words, folder, ranks) if ranks > 1 else _Forked(words, folder)
    told = False
    try:
        while (code := process.code()) is None:
            if not told and stop():
                told = True
                process.terminate()
            time.sleep(POLL_SECONDS)
    except BaseException:
        process.terminate()
        raise
    if told and code == -signal.SIGTERM:
        code = REQUEUE
    return code, "" if code == 0 else _tail(folder / CONSOLE)


class _Child:
    def code(self) -> int | None:
        """Exit code; None while it runs. A signal counts as minus its number."""
        raise NotImplementedError

    def terminate(self) -> None:
        """Ask it to save and to end."""
        raise NotImplementedError


class _Forked(_Child):
    def __init__(self, words: list[str], folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        # The server imports and forks; it runs nothing in parallel itself, so that its children may.
        context.set_forkserver_preload(list(PRELOADED))
        self._process = context.Process(target=_train, args=(words, str(folder / CONSOLE)))
        with _plain_main():
            self._process.start()

    def code(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()


class _Ranks(_Child):
    def __init__(self, words: list[str], folder: Path, ranks: int) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in PLACE}
        command = [sys.executable, str(launch_script()), "--ranks", str(ranks), *words]
        with (folder / CONSOLE).open("ab") as console:
            self._process = subprocess.Popen(
                command, stdout=console, stderr=console, stdin=subprocess.DEVNULL, env=environment
            )

    def code(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def _plain_main() -> Any:
    # multiprocessing would run the starting program's main module again in the child: Ray's worker, or
    # pytest.
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    for name in hidden:
        setattr(main, name, None)
    if getattr(main, "__file__", None) is None:
        del main.__file__
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


def _train(words: list[str], console: str) -> None:
    # In the child. The server's end, and so that of whoever started it, is the launcher's end.
    descriptor = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    for name in PLACE:
        os.environ.pop(name, None)
    os.environ[SUPERVISED] = str(os.getppid())
    from spikescale.training.ending import end_process
    from spikescale.training.start import main

    code = 1
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    end_process(code)


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError):
        content = path.read_bytes()[-TAIL:]
        return content.decode("utf-8", errors="replace")
    return ""
