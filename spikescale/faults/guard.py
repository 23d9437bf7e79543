"""What keeps watch over one rank's process while it trains: stop requests, the launcher, the watchdog.

The loop talks to this object alone. Once a step it asks `agree`, in one small reduction over all ranks, what
the loss is and whether any rank was asked to stop, could not read on or could not save.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from spikescale.config import FaultConfig
from spikescale.faults.launcher import SUPERVISED, LauncherWatch, has_launcher
from spikescale.faults.stop import REASONS, StopRequest
from spikescale.faults.watchdog import Watchdog
from spikescale.training.bootstrap import Process


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a step: the same on each."""

    loss: float  # nats a token, mean over the ranks
    stop: str | None  # why the run is to end here
    unreadable: bool  # some rank cannot read the next batch
    unsaved: bool  # some rank's save in the background failed


class Guard:
    """One a process. `install` early; `begin` when the run's folder is known; `close` at the end."""

    def __init__(self) -> None:
        self.stop = StopRequest()
        self.watchdog: Watchdog | None = None
        self._launcher: LauncherWatch | None = None

    def install(self, environment: Mapping[str, str], deepspeed: bool, name: str = "") -> "Guard":
        """Take over the signals, and watch the launcher if there is one (`deepspeed`: and its helper).

        environment: as the launcher made it. `name` stands in front of what is said. Only the main thread can
        take signals over; others go without.
        """
        self.stop.name = name
        if threading.current_thread() is threading.main_thread():
            self.stop.install()
        if has_launcher(environment, deepspeed):
            parent = int(environment.get(SUPERVISED, 0)) or None
            self._launcher = LauncherWatch(self.stop, self._idle_seconds, deepspeed, parent).start()
        return self

    def begin(
        self,
        config: FaultConfig,
        process: Process,
        folder: Path,
        on_hang: Callable[[str, float], None] | None = None,
    ) -> None:
        """From now on stop requests wait for the loop, and the watchdog looks after the steps."""
        self.watchdog = Watchdog(config.hang_seconds, process.rank, folder, on_hang).start()
        self.stop.defer()

    def end(self) -> None:
        """The run is over: no step is waited for any more."""
        if self.watchdog:
            self.watchdog.close()

    def close(self) -> None:
        """Give everything back."""
        self.end()
        if self._launcher:
            self._launcher.close()
        self.stop.uninstall()

    def _idle_seconds(self) -> float:
        return self.watchdog.idle_seconds() if self.watchdog else 0.0

    def beat(self) -> None:
        """There is progress."""
        if self.watchdog:
            self.watchdog.beat()

    def step_done(self) -> None:
        """A training step ended."""
        if self.watchdog:
            self.watchdog.step()

    def patience(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """While the block runs, what it does may take long."""
        return self.watchdog.patience(phase) if self.watchdog else contextlib.nullcontext()

    def agree_on_waiting(
        self, process: Process, device: torch.device, ready: bool, failed: bool
    ) -> tuple[bool, str | None]:
        """Whether waiting for the next batch is over, and why the run is to stop, the same on all ranks.

        It is over when every rank has its part, or any cannot have it. Every rank calls it, again and again.
        """
        self.beat()
        asked = [self.stop.reason == reason for reason in REASONS]
        flags = torch.tensor([*asked, not ready, failed], dtype=torch.float32).to(device)
        if process.world_size > 1:
            torch.distributed.all_reduce(flags)
        counts = flags.tolist()
        stop = next((reason for reason, count in zip(REASONS, counts, strict=False) if count), None)
        return counts[-2] == 0 or counts[-1] > 0, stop

    def agree(self, process: Process, loss: torch.Tensor, unreadable: bool, unsaved: bool) -> Agreement:
        """Tell the other ranks, and hear from them. loss: this rank's, a float32 scalar."""
        asked = [self.stop.reason == reason for reason in REASONS]
        if process.world_size == 1:
            return Agreement(float(loss), self.stop.reason, unreadable, unsaved)
        flags = torch.tensor([*asked, unreadable, unsaved], dtype=loss.dtype).to(loss.device)
        told = torch.cat([loss.reshape(1), flags])
        torch.distributed.all_reduce(told)
        counts = told[1:].tolist()
        stop = next((reason for reason, count in zip(REASONS, counts, strict=False) if count), None)
        mean = float(told[0] / process.world_size)
        return Agreement(mean, stop, bool(counts[-2]), bool(counts[-1]))
