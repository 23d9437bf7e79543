"""A request to stop that comes from outside: a signal, or the end of the launcher.

SIGTERM and SIGUSR1 (what SLURM sends ahead of a time limit) are taken up by a thread, because Python runs
signal handlers only between its own instructions: a rank that waits inside a collective would not see them.
The training loop reads `reason` at a point where all ranks can agree on it.
"""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from spikescale.faults.exits import REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REASONS = (*(number.name for number in SIGNALS), "the end of its launcher")
LAUNCHER_GONE = REASONS[-1]
SAME_REQUEST_SECONDS = 1.0  # a launcher and the system may each pass the same request on


class StopRequest:
    """Whether this process was asked to stop, and by what.

    Until `defer` is called and after `release`, nothing would be lost by an end at once, so that is what a
    request brings, with code 75. In between it is kept for the loop; the same signal once more, a second or
    later, ends the process at once with 128 + its number.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.name = ""  # stands in front of what is said
        self._deferred = False
        self._since: dict[int, float] = {}
        self._earlier: dict[signal.Signals, Any] = {}
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None

    def install(self) -> "StopRequest":
        """Take the signals over. Only the main thread can."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            self._earlier[number] = signal.signal(number, _do_nothing)
        threading.Thread(target=self._listen, args=(self._reader,), name="signals", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Give the signals back."""
        if self._writer is None:
            return
        signal.set_wakeup_fd(-1)
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._writer.close()
        self._writer = None

    def defer(self) -> None:
        """From now on a request waits for the loop."""
        self._deferred = True

    def release(self) -> None:
        """From now on a request ends the process at once: everything is saved."""
        self._deferred = False
        if self.reason is not None:
            self._end(f"stopped by {self.reason}; everything is saved", REQUEUE)

    def ask(self, reason: str) -> None:
        """Ask for a stop for one of REASONS."""
        if not self._deferred:
            self._end(f"stopped by {reason}; no step was lost", REQUEUE)
        self.reason = self.reason or reason

    def _listen(self, reader: socket.socket) -> None:
        while received := reader.recv(64):
            for number in received:
                if number in SIGNALS:
                    self._received(signal.Signals(number))

    def _received(self, number: signal.Signals) -> None:
        now = time.monotonic()
        first = self._since.setdefault(number, now)
        if now - first >= SAME_REQUEST_SECONDS:
            self._end(f"a second {number.name}: ended at once, without saving", 128 + number)
        self.ask(number.name)

    def _end(self, text: str, code: int) -> None:
        sys.stderr.write(f"{self.name}{text}\n")
        sys.stderr.flush()
        os._exit(code)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    # Only so that the system neither ends the process nor drops the signal; the thread acts on it.
    return
