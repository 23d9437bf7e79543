"""The run's side of the producer: start it, tell it what is needed, listen, start it again when killed."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.live import FAILED, LOG, write_failure
from spikescale.data_pipeline.producer import ProducerJob
from spikescale.errors import UserError

RESTARTS = 3  # of a producer that was killed before it had made another shard
END_SECONDS = 15.0


class ProducerProcess:
    """A producer as a child process, with whatever it says.

    Use as a context manager: at the end the producer ends, too, and what it has made stays.
    """

    def __init__(self, job: ProducerJob) -> None:
        self._job = job
        self._folder = Path(job.output)
        self._lock = threading.Lock()
        self._needs: list[tuple[int, int]] = []
        self._head = threading.Event()
        self._closing = False
        self._holding = False
        self._seconds: dict[str, float] = {}
        self._marked: dict[str, float] = {}
        self.done = self.partitions = self.restarts = 0
        self.failure: str | None = None
        self.complete = False
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._watch, name="producer", daemon=True)

    def __enter__(self) -> "ProducerProcess":
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / FAILED).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written to ({error.strerror})") from None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_for_head(self, seconds: float) -> bool:
        """Whether tokenizer and validation shards are there; waits so long at most.

        Raises UserError when they cannot be made.
        """
        there = self._head.wait(seconds)
        if self.failure is not None:
            raise UserError(self.failure)
        return there

    def need(self, first: int, stop: int) -> None:
        """The reader is about to need the shards with these numbers."""
        with self._lock:
            if (first, stop) not in self._needs:
                self._needs.append((first, stop))
                self._send(f"need {first} {stop}")

    def slowest(self) -> str:
        """What the producer's time went to since the last call, in words; empty when it has not worked."""
        with self._lock:
            spent = {
                stage: seconds - self._marked.get(stage, 0.0) for stage, seconds in self._seconds.items()
            }
            self._marked = dict(self._seconds)
            holding = self._holding
        whole = sum(spent.values())
        if holding:
            return "it holds back: the look-ahead is full (look_ahead_shards, look_ahead_mib of its stream)"
        if whole <= 0:
            return "no shard was finished meanwhile"
        ordered = sorted(spent.items(), key=lambda entry: -entry[1])
        shares = ", ".join(f"{stage} {seconds / whole:.0%}" for stage, seconds in ordered)
        workers = self._job.settings["workers"]
        return f"{ordered[0][0]} is slowest ({shares} of the time of {workers} worker(s))"

    def end(self) -> None:
        """Tell the producer to end, without waiting for it."""
        self._closing = True
        with self._lock:
            process = self._process
            if process is not None and process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                    process.stdin.close()

    def close(self) -> None:
        """End the producer. What it was making is made again by the next one."""
        self.end()
        process = self._process
        if process is not None and process.poll() is None:
            try:
                process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread.is_alive():
            self._thread.join(timeout=END_SECONDS)

    @property
    def pid(self) -> int | None:
        """Of the child process."""
        return self._process.pid if self._process else None

    def _watch(self) -> None:
        try:
            self._keep_running()
        except Exception as error:  # whatever it is, nobody may wait for ever
            self._fail(f"{self._folder}: the data producer cannot be run ({' '.join(str(error).split())})")
        finally:
            self._head.set()

    def _keep_running(self) -> None:
        attempts = 0
        while not self._closing:
            before = self.done
            code = self._run_once()
            if self.complete or self.failure is not None or self._closing:
                break
            attempts = 1 if self.done > before else attempts + 1
            if attempts > RESTARTS:
                self._fail(
                    f"{self._folder}: the data producer ended again and again (exit code {code}); "
                    f"see {self._folder / LOG}"
                )
                break
            self.restarts += 1
            time.sleep(min(attempts, 5))

    def _run_once(self) -> int:
        command = [sys.executable, "-m", "spikescale.data_pipeline.producer"]
        with (self._folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                start_new_session=True,  # signals are the run's to answer; it ends when the pipe does
            )
        with self._lock:
            self._process = process
            self._seconds, self._marked, self._holding = {}, {}, False
            self._send(self._job.to_line())
            for first, stop in self._needs:
                self._send(f"need {first} {stop}")
            if self._closing and process.stdin is not None:
                process.stdin.close()
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # what a library printed is not for us
                self._hear(json.loads(line))
        return process.wait()

    def _send(self, line: str) -> None:
        process = self._process
        if process is None or process.stdin is None or process.stdin.closed:
            return
        # If it is gone, `_watch` starts another, which is told the same.
        with contextlib.suppress(BrokenPipeError, ValueError):
            print(line, file=process.stdin, flush=True)

    def _hear(self, said: dict[str, Any]) -> None:
        kind = said["kind"]
        with self._lock:
            if kind == "progress":
                self.done, self.partitions = said["done"], said["of"]
                self._seconds = said["seconds"]
            elif kind == "holding":
                self._holding = said["on"]
        if kind == "complete":
            self.complete = True
        if kind == "error":
            self._fail(said["error"])
        if kind in ("head", "complete"):
            self._head.set()

    def _fail(self, line: str) -> None:
        self.failure = line
        self._head.set()
        with contextlib.suppress(OSError):  # a full disk is the failure itself, perhaps
            write_failure(self._folder, line)
