"""`launch/pretrain.py --ranks R --max-restarts N`: the launcher and supervisor of one machine's ranks.

It starts R processes, each in a session of its own so that a signal to the terminal or the group comes from
here alone, and waits. When one fails, the others are given time to notice, then ended, and all start
again from the newest checkpoint. It imports no torch: it costs a few megabytes and no time.

A rank that is alive when the supervisor dies gets SIGTERM from the kernel: before the first step that
ends it, later it saves first.
"""

import argparse
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from spikescale.config import load_config
from spikescale.errors import UserError
from spikescale.faults.events import append_event
from spikescale.faults.exits import (
    BAD_INPUT,
    DONE,
    FINAL,
    LOST,
    REQUEUE,
    shell_code,
    signal_name,
)
from spikescale.faults.launcher import SUPERVISED

POLL_SECONDS = 0.05
SETTLE_SECONDS = 5.0  # for the other ranks to end by themselves after one has
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
BACK_OFF_SECONDS = (1.0, 60.0)  # before the first restart and at most; doubled while there is no progress
HOPELESS = 3  # failures in a row without a new checkpoint between them
PORTS = range(20000, 30000)  # below those that the system gives to outgoing connections
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBRARY = ctypes.CDLL(None)


def supervise(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Start and look after the ranks; the exit code is theirs. Raises UserError if they cannot be started."""
    _refuse_launchers(environment)
    config = load_config(arguments.config, arguments.settings)
    supervisor = Supervisor(
        command=[sys.executable, sys.argv[0], "--config", arguments.config, *arguments.settings],
        ranks=arguments.ranks or 1,
        max_restarts=arguments.max_restarts or 0,
        folder=config.folder,
    )
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda received, frame: supervisor.pass_on(received))
    return supervisor.run()


def _refuse_launchers(environment: Mapping[str, str]) -> None:
    names = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names.append("SLURM_STEP_NUM_TASKS")
    if names:
        raise UserError(
            f"--ranks and --max-restarts start the ranks themselves, but {names[0]} says that a launcher has"
            " done so: leave them out, and let it restart (torchrun --max-restarts N, sbatch --requeue)"
        )


class Supervisor:
    """Runs `command` as `ranks` processes that train together, again and again until they end well.

    folder: of the run; its checkpoints show whether there is progress.
    """

    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        max_restarts: int,
        folder: Path,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.command, self.ranks, self.max_restarts, self.folder = list(command), ranks, max_restarts, folder
        self.restarts = 0
        self._say = say or _to_standard_error
        self._processes: list[subprocess.Popen[bytes]] = []
        self._told = False  # the ranks that are left have been told to end
        self._asked: int | None = None  # the signal that asked for an end

    def run(self) -> int:
        """Train to an end; the exit code: that of the first rank to end otherwise than well."""
        failures = 0
        wait = BACK_OFF_SECONDS[0]
        while True:
            before = self.newest_checkpoint()
            code, culprit = self._attempt()
            if code in FINAL or self._asked is not None:
                return code
            progress = self.newest_checkpoint() != before
            failures = 1 if progress else failures + 1
            wait = BACK_OFF_SECONDS[0] if progress else wait
            if self.restarts >= self.max_restarts:
                if self.max_restarts:
                    self._say(f"error: {culprit}; {self.restarts} restart(s) used up (--max-restarts)")
                return code
            if failures >= HOPELESS:
                self._say(
                    f"error: {culprit}; {failures} failures in a row without a new checkpoint: given up"
                )
                return code
            self.restarts += 1
            after = self.newest_checkpoint() or "the beginning"
            self._say(
                f"{culprit}; restart {self.restarts} of {self.max_restarts} in {wait:.0f} s from {after}"
            )
            self._record(code, culprit, after)
            if not self._sleep(wait):
                return code
            wait = min(2 * wait, BACK_OFF_SECONDS[1])

    def pass_on(self, number: int) -> None:
        """Send a signal that came here to all ranks; from now on nothing is started again."""
        self._asked = number
        self._send(signal.Signals(number))

    def newest_checkpoint(self) -> str | None:
        """Name of the newest checkpoint that is published."""
        names = (path.name for path in (self.folder / "checkpoints").glob("step-*"))
        return max(names, default=None)

    def _attempt(self) -> tuple[int, str]:
        """Start all ranks and wait for all. (the exit code, a sentence on the rank that it comes from)."""
        self._start()
        first: tuple[int, int] | None = None  # (rank, code) of the first that ended otherwise than well
        since = 0.0
        # All are asked, not only until one is found alive.
        while None in (codes := [process.poll() for process in self._processes]):
            if first is None:
                first = next(((rank, code) for rank, code in enumerate(codes) if code), None)
                since = time.monotonic()
            elif self._asked is None:
                self._end_others(time.monotonic() - since)
            time.sleep(POLL_SECONDS)
        if first is None:
            first = next(((rank, code) for rank, code in enumerate(codes) if code), None)
        return _judge([code or DONE for code in codes], first)

    def _start(self) -> None:
        port = _free_port()
        words = ["resume=auto"] if self.restarts else []  # whatever the first start was told
        self._processes, self._told = [], False
        for rank in range(self.ranks):
            place = {
                "RANK": rank,
                "WORLD_SIZE": self.ranks,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": self.ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                SUPERVISED: os.getpid(),
            }
            self._processes.append(
                subprocess.Popen(
                    [*self.command, *words],
                    env={**os.environ, **{name: str(value) for name, value in place.items()}},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,  # this process has a single thread
                )
            )
        if self._asked is not None:  # between two attempts, or while they were being started
            self._send(signal.Signals(self._asked))

    def _end_others(self, seconds: float) -> None:
        """End the ranks left over `seconds` after the first failed; at first they may end by themselves."""
        if seconds > SETTLE_SECONDS + GRACE_SECONDS:
            self._send(signal.SIGKILL)
        elif seconds > SETTLE_SECONDS and not self._told:
            self._told = True  # once: a second SIGTERM would keep them from saving
            self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _sleep(self, seconds: float) -> bool:
        """Wait; whether to go on, which a signal meanwhile forbids."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._asked is None:
            time.sleep(POLL_SECONDS)
        return self._asked is None

    def _record(self, code: int, culprit: str, after: str) -> None:
        if self.folder.is_dir():
            facts = {"number": self.restarts, "code": code, "reason": culprit, "from": after}
            append_event(self.folder, "restart", None, **facts)


def _judge(codes: Sequence[int], first: tuple[int, int] | None) -> tuple[int, str]:
    """The code of all, and a sentence on the rank that it comes from.

    Ranks that only lost another one, or were ended because of it, are not to blame for anything.
    """
    if first is None:
        return DONE, "all ranks ended well"
    blamed = [(rank, code) for rank, code in enumerate(codes) if code not in (DONE, LOST, -signal.SIGTERM)]
    if any(code == BAD_INPUT for _, code in blamed):
        first = next((rank, code) for rank, code in blamed if code == BAD_INPUT)
    elif first[1] in (LOST, -signal.SIGTERM, REQUEUE):
        # One that stopped to be started again is the cause only where no other failed.
        others = [pair for pair in blamed if pair[1] != REQUEUE]
        first = others[0] if others else blamed[0] if blamed else first
    rank, code = first
    name = signal_name(code)
    return shell_code(code), f"rank {rank} " + (f"was ended by {name}" if name else f"ended with code {code}")


def _free_port() -> int:
    for port in random.sample(PORTS, 100):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError(
        f"no port from {PORTS.start} to {PORTS.stop - 1} is free on 127.0.0.1 for the ranks to meet at"
    )


def _die_with_parent() -> None:
    # In the child, before it becomes the rank. The signal is the kernel's: it comes however the parent ends.
    if hasattr(_LIBRARY, "prctl"):
        _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _to_standard_error(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
