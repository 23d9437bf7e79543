"""One checkpoint on its way to the disk: threads that write, and meet through the file system.

Each rank's thread writes, flushes and sums its own files and then leaves a note of them; rank 0's thread
waits for the notes of all ranks and publishes. No thread takes part in the communication between ranks,
which belongs to training. A rank whose write fails leaves a note of that instead, if the disk lets it;
either way the ranks' main threads learn of it when they meet (`CheckpointFolder.finish`).
"""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikescale.errors import UserError
from spikescale.files import read_json, write_json
from spikescale.tensor_file import FileRecord
from spikescale.training.bootstrap import Process

POLL_SECONDS = (0.01, 0.5)  # between looks for other ranks' notes, growing from the first to the second


class AbandonedError(Exception):
    """The save was given up elsewhere; there is nothing left to do or to say."""


class Saving:
    """A save in flight.

    aside: the unpublished folder, which exists. write: writes this rank's files into it and returns what it
    wrote, by path relative to `aside`. publish: on rank 0, makes a checkpoint of it, given what all ranks
    wrote.
    """

    def __init__(
        self,
        process: Process,
        aside: Path,
        write: Callable[[], dict[str, FileRecord]],
        publish: Callable[[dict[str, Any]], None],
    ) -> None:
        self.process, self.aside = process, aside
        self.stall_seconds = 0.0  # that training stood still for it
        self.write_seconds = 0.0  # from the start of the threads to the publication
        self.error: BaseException | None = None
        self.told = False  # whether its end was said
        self._write: Callable[[], dict[str, FileRecord]] | None = write
        self._publish = publish
        self._written, self._abandoned = threading.Event(), threading.Event()
        self._write_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether this rank's thread still works on it."""
        return self._thread.is_alive()

    def wait_written(self) -> BaseException | None:
        """Wait until this rank's own files are on the disk; the error that kept them from it."""
        self._written.wait()
        return self._write_error

    def wait_published(self, seconds: float | None = None) -> BaseException | None:
        """Wait for this rank's thread to end; the error that ended it."""
        self._thread.join(seconds)
        return self.error

    def abandon(self) -> None:
        """Stop waiting for other ranks: nothing will be published. Returns when the thread has ended."""
        self._abandoned.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self._write_own()
            if self.process.is_main:
                self._publish(self._collect())
        except BaseException as error:  # handed to the main thread, which raises it
            self.error = error
        finally:
            self.write_seconds = time.perf_counter() - began

    def _write_own(self) -> None:
        assert self._write is not None
        try:
            records = self._write()
            files = {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in records.items()}
            write_json(self._note("written", self.process.rank), files)
        except BaseException as error:
            self._write_error = error
            with contextlib.suppress(OSError):
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                write_json(self._note("failed", self.process.rank), {"reason": reason})
            raise
        finally:
            self._write = None  # frees the copy of the state
            self._written.set()

    def _collect(self) -> dict[str, Any]:
        """What all ranks wrote, when all have; on rank 0."""
        files: dict[str, Any] = {}
        pause = POLL_SECONDS[0]
        for rank in range(self.process.world_size):
            while not self._note("written", rank).is_file():
                if self._note("failed", rank).is_file():
                    reason = read_json(self._note("failed", rank))["reason"]
                    raise UserError(f"rank {rank}: {reason}")
                if self._abandoned.wait(pause):
                    raise AbandonedError
                pause = min(2 * pause, POLL_SECONDS[1])
            files |= read_json(self._note("written", rank))
        for rank in range(self.process.world_size):
            self._note("written", rank).unlink()
        return files

    def _note(self, what: str, rank: int) -> Path:
        return self.aside / f"{what}-{rank:05d}.json"
