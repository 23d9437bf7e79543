"""A rank that hangs says where, and ends.

When no step ends for too long, every thread's stack is written to `stacks-rankN.txt` and to standard error,
and the process ends with a code of its own, so that a supervisor starts the run again. When one rank hangs
the others wait for it, so that all of them write their stacks; the files of those that wait show a
collective, the one that hangs shows the cause.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spikescale.faults.exits import HUNG

PATIENCE_SECONDS = 1800.0  # least limit of what is no plain step: the first one, a save, a long evaluation
LINGER_SECONDS = 2.0  # between the stacks and the end, so that other ranks get to write theirs
LAST_SECONDS = 60.0  # that writing the stacks may take
BACKSTOP = 2.0  # times the limit, after which a process whose interpreter itself is blocked is ended


class Watchdog:
    """Watches the time since the last beat.

    seconds: a plain step's limit; 0: nothing is watched, only beats are kept.
    folder: where the stacks go; its `stacks-rankN.txt` of an earlier process stays until then.
    on_hang: called, with what was being done and for how long, before the end.
    """

    def __init__(
        self,
        seconds: float,
        rank: int,
        folder: Path,
        on_hang: Callable[[str, float], None] | None = None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.seconds, self._rank, self._folder = seconds, rank, folder
        self._on_hang, self._end = on_hang, end
        self._phase, self._limit = "the start", max(seconds, PATIENCE_SECONDS)
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def path(self) -> Path:
        """The file of this rank's stacks."""
        return self._folder / f"stacks-rank{self._rank}.txt"

    def start(self) -> "Watchdog":
        """Begin to watch, with patience until the first step."""
        self.beat()
        if self.seconds:
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """Something got done."""
        self._last = time.monotonic()

    def step(self) -> None:
        """A step ended: from now on the limit is a plain step's."""
        self._last = time.monotonic()
        self._phase, self._limit = "a step", self.seconds

    def idle_seconds(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._last

    @contextlib.contextmanager
    def patience(self, phase: str) -> Iterator[None]:
        """While the block runs, more time may pass between beats; `phase` says what takes it."""
        before = self._phase, self._limit
        self._phase, self._limit = phase, max(self.seconds, PATIENCE_SECONDS)
        self.beat()
        yield
        self._phase, self._limit = before
        self.beat()

    def _watch(self) -> None:
        poll = min(1.0, self.seconds / 10)
        looked = time.monotonic()
        while not self._over.wait(poll):
            now = time.monotonic()
            if now - looked > max(5.0, 10 * poll):
                self._last = now  # the whole process was suspended: nothing hung
            looked = now
            # In C, and so also while something holds the interpreter's lock and this thread cannot run.
            faulthandler.dump_traceback_later(BACKSTOP * self._limit, exit=True)
            if self.idle_seconds() > self._limit:
                self._bark()
                return
        faulthandler.cancel_dump_traceback_later()

    def _bark(self) -> None:
        waited, phase = self.idle_seconds(), self._phase
        faulthandler.dump_traceback_later(LAST_SECONDS, exit=True)
        text = f"rank {self._rank}: no progress for {waited:.0f} s in {phase}; stacks in {self.path}; ended"
        try:
            with self.path.open("w", encoding="utf-8") as file:
                print(text, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            text += f" (they could not be written: {error})"
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        with contextlib.suppress(Exception):
            if self._on_hang:
                self._on_hang(phase, waited)
        time.sleep(LINGER_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        self._end(HUNG)
