"""Noticing that the launcher is gone, which would leave ranks running that nobody watches.

`deepspeed` that gets SIGTERM leaves its helper process and the ranks behind; any launcher that is killed
leaves its ranks. The system then gives their parent, or its parent, another parent: that is what is watched.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from spikescale.faults.exits import LOST
from spikescale.faults.stop import LAUNCHER_GONE, StopRequest

SUPERVISED = "SPIKESCALE_SUPERVISOR"  # set by spikescale.faults.supervisor to its process id
POLL_SECONDS = 0.5
STUCK_SECONDS = 300.0  # an orphan that makes no progress for so long ends without saving


def has_launcher(environment: Mapping[str, str], deepspeed: bool) -> bool:
    """Whether a launcher that should outlive its ranks started this process.

    A process that a person or a batch system started must survive the shell that it came from.
    """
    return deepspeed or SUPERVISED in environment or "TORCHELASTIC_RUN_ID" in environment


def parent_of(process: int) -> int | None:
    """The parent's id of a process; None when it, or the information, is not there."""
    try:
        # The command's name, in brackets, may hold anything; the fields after it are plain.
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


class LauncherWatch:
    """A thread that asks for a stop when the launcher has ended, and ends the process if that leads nowhere.

    idle_seconds: since the last sign of progress. parent: the launcher's process id, where it is known; the
    launcher may have ended before this process got here.
    """

    def __init__(
        self,
        stop: StopRequest,
        idle_seconds: Callable[[], float],
        deepspeed: bool = False,
        parent: int | None = None,
    ) -> None:
        self._stop, self._idle_seconds = stop, idle_seconds
        self._parent = parent or os.getppid()
        # deepspeed's ranks have a helper between them and the launcher, which does not notice its end.
        self._grandparent = parent_of(self._parent) if deepspeed else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="launcher-watch", daemon=True)

    def start(self) -> "LauncherWatch":
        """Begin to watch."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop watching."""
        self._over.set()

    def is_gone(self) -> bool:
        """Whether the launcher has ended."""
        if os.getppid() != self._parent:
            return True
        return self._grandparent is not None and parent_of(self._parent) != self._grandparent

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            if self.is_gone():
                self._stop.ask(LAUNCHER_GONE)
                break
        while not self._over.wait(POLL_SECONDS):
            if self._idle_seconds() > STUCK_SECONDS:
                sys.stderr.write(f"the launcher is gone and no step ended for {STUCK_SECONDS:.0f} s: ended\n")
                sys.stderr.flush()
                os._exit(LOST)
