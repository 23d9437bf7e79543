"""The process that makes shards while a run reads them: never too far ahead, in the order of the reading.

    python -m spikescale.data_pipeline.producer < requests > answers

The first line on standard input is the job (`ProducerJob`), each later one `need FIRST STOP`: the shard
numbers that a reader is about to need. Standard output has one JSON object a line: the head of the data set,
how far the work is and where its time goes, the end, or an error. When standard input ends, so does the
process: it cannot outlive the run it works for.
"""

import _thread
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from spikescale.data_pipeline.clean import CleanSettings
from spikescale.data_pipeline.live import FAILED, Head
from spikescale.data_pipeline.manifest import TokenizerInfo
from spikescale.data_pipeline.order import EpochOrder
from spikescale.data_pipeline.pools import Supervisor
from spikescale.data_pipeline.prepare import Job, PrepareSettings, opened_job
from spikescale.data_pipeline.progress import Progress
from spikescale.data_pipeline.shards import ShardInfo
from spikescale.data_pipeline.sources import open_source
from spikescale.data_pipeline.split import SplitSettings
from spikescale.errors import UserError

IDLE_SECONDS = 0.05
PATIENCE_SECONDS = 10.0  # for an orderly end, workers included
PREDECESSOR_SECONDS = 30.0  # for one whose run was killed, and which may still be ending


@dataclass(frozen=True)
class ProducerJob:
    """What to make, and how far ahead of the reader.

    Attributes:
        output: the data set's folder.
        source: names or paths; options: reading options given; catalogs: more sources.
        settings: of the preparation, as for `PrepareSettings`, `split` as a mapping.
        seed, shuffle_window: of the reading order.
        valid_tokens: tokens of the validation split that must be there before the training begins.
        ahead_shards, ahead_bytes: of token files, beyond the shards that are being read.
    """

    output: str
    source: list[str]
    options: dict[str, Any]
    catalogs: list[str]
    settings: dict[str, Any]
    seed: int
    shuffle_window: int
    valid_tokens: int
    ahead_shards: int
    ahead_bytes: int

    def to_line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))


def reading_order(partitions: int, seed: int, shuffle_window: int) -> list[int]:
    """The shard numbers in the order in which the first epoch's windows need them."""
    order = EpochOrder(_NoShards(), "train", partitions, 1, seed, shuffle_window)
    numbers: list[int] = []
    for window in order.window_order(0):
        first = window * shuffle_window
        numbers += range(first, min(first + shuffle_window, partitions))
    return numbers


class LookAhead(Supervisor):
    """Admits shards up to a distance, in shards and in bytes, beyond what the reader has reached.

    What the reader is about to need is always admitted, however large.

    Args:
        numbers: shard numbers in the order of the work.
        ahead_shards, ahead_bytes: the distance.
        report: is given each progress, for the other side.
    """

    def __init__(self, numbers: Sequence[int], ahead_shards: int, ahead_bytes: int, report: Any) -> None:
        self._numbers = list(numbers)
        self._places = {number: place for place, number in enumerate(numbers)}
        self._ahead_shards, self._ahead_bytes = ahead_shards, ahead_bytes
        self._report = report
        self._lock = threading.Lock()
        self._reached = 0  # places before this one are read or being read
        self._bytes: dict[int, int] = {}  # of finished shards from that place on
        self._done = 0
        self._seconds: dict[str, float] = {}
        self.shards: list[ShardInfo] = []
        self.held = False

    def need(self, first: int, stop: int) -> None:
        """The reader is about to need the shards with these numbers."""
        with self._lock:
            places = [self._places[number] for number in range(first, stop) if number in self._places]
            self._reached = max([self._reached, *(place + 1 for place in places)])
            self._bytes = {place: size for place, size in self._bytes.items() if place >= self._reached}

    def admits(self, index: int) -> bool:
        """See Supervisor."""
        with self._lock:
            waiting = sum(self._bytes.values())
            near = index < self._reached + self._ahead_shards and waiting < self._ahead_bytes
            self.held = not (near or index < self._reached)
            return not self.held

    def finished(self, index: int, result: list[ShardInfo], seconds: Mapping[str, float]) -> None:
        """See Supervisor."""
        with self._lock:
            self.shards += result
            self._done += 1
            if index >= self._reached:
                self._bytes[index] = sum(shard.path.stat().st_size for shard in result if shard.tokens)
            for stage, amount in seconds.items():
                self._seconds[stage] = self._seconds.get(stage, 0.0) + amount
            done = self._done
        self._report({"kind": "progress", "done": done, "of": len(self._numbers), "seconds": self._seconds})


class Producer:
    """Makes one data set for a reader on the other side of two pipes."""

    def __init__(self, job: ProducerJob, requests: TextIO, answers: TextIO) -> None:
        self._job, self._requests, self._answers = job, requests, answers
        self._needs: list[tuple[int, int]] = []
        self._ahead: LookAhead | None = None
        self._lock = threading.Lock()

    def run(self) -> None:
        """Make the data set, to the manifest. Raises UserError."""
        job = self._job
        threading.Thread(target=self._listen, name="requests", daemon=True).start()
        folder = Path(job.output)
        (folder / FAILED).unlink(missing_ok=True)
        settings = PrepareSettings(
            **{
                **job.settings,
                "split": SplitSettings(**job.settings["split"]),
                "clean": clean_settings(job.settings["clean"]),
                "condition_on": tuple(job.settings["condition_on"]),
                "quiet": True,
            }
        )
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in job.options.items()
        }
        source = open_source(job.source, catalogs=[Path(path) for path in job.catalogs], **options)
        with opened_job(source, folder, settings, PREDECESSOR_SECONDS) as opened:
            if opened.complete():
                self.answer({"kind": "complete"})
                return
            lead = self._make_lead(opened)
            tokenizer = opened.tokenizer
            info = TokenizerInfo(tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256)
            partitions = len(opened.partitions)
            head = Head(opened.request, opened.source, partitions, opened.dtype.name, info, lead)
            head.write(opened.folder)
            self.answer({"kind": "head", "partitions": partitions})
            opened.finish(self._make(opened))
        self.answer({"kind": "complete"})

    def _make_lead(self, job: Job) -> int:
        """Make the first shards, until they have the validation tokens that the run looks at; how many."""
        made: list[int] = []  # validation tokens of each
        wanted = self._job.valid_tokens if job.settings.split.expects("valid") else 0
        while sum(made) < wanted and len(made) < len(job.tasks):
            first = len(made)
            # In few rounds, because Ray's workers start anew in each: as many as seem to be missing, which at
            # most doubles what is there.
            missing = math.ceil((wanted - sum(made)) * first / sum(made)) if sum(made) else first
            stop = first + max(1, job.settings.workers, min(missing, first))
            with Progress("", [0] * len(job.tasks), quiet=True) as progress:
                results = job.pool.run(job.tasks[first:stop], progress)
            made += [sum(shard.tokens for shard in found if shard.split == "valid") for found in results]
            self.answer({"kind": "progress", "done": len(made), "of": len(job.tasks), "seconds": {}})
        # No more than it takes, whatever the number of workers: what is evaluated must not depend on it.
        while made and sum(made[:-1]) >= wanted:
            made.pop()
        return len(made)

    def _make(self, job: Job) -> list[ShardInfo]:
        order = reading_order(len(job.partitions), self._job.seed, self._job.shuffle_window)
        ahead = LookAhead(order, self._job.ahead_shards, self._job.ahead_bytes, self.answer)
        with self._lock:
            self._ahead = ahead
            for first, stop in self._needs:
                ahead.need(first, stop)
        tasks = [job.tasks[number] for number in order]
        threading.Thread(target=self._tell_holding, args=(ahead,), name="holding", daemon=True).start()
        with Progress("", [0] * len(tasks), quiet=True) as progress:
            job.pool.run(tasks, progress, ahead)
        return sorted(ahead.shards, key=lambda shard: (shard.number, shard.split))

    def _listen(self) -> None:
        for line in self._requests:
            words = line.split()
            if len(words) == 3 and words[0] == "need":
                with self._lock:
                    self._needs.append((int(words[1]), int(words[2])))
                    if self._ahead is not None:
                        self._ahead.need(*self._needs[-1])
        # The run that this process works for is gone, or done.
        _thread.interrupt_main()
        time.sleep(PATIENCE_SECONDS)
        os._exit(0)

    def _tell_holding(self, ahead: LookAhead) -> None:
        told = False
        while True:
            if ahead.held != told:
                told = ahead.held
                self.answer({"kind": "holding", "on": told})
            time.sleep(IDLE_SECONDS)

    def answer(self, content: Mapping[str, Any]) -> None:
        """Say something to the other side, from any thread."""
        with self._lock:
            print(json.dumps(content), file=self._answers, flush=True)


def clean_settings(given: Mapping[str, Any], where: str = "data.stream.clean") -> CleanSettings:
    """Settings of cleaning out of JSON, whose lists stand for tuples. Raises UserError, saying `where`."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    if "rules" in values:
        values["rules"] = tuple(tuple(rule) for rule in values["rules"])
    try:
        return CleanSettings(**values)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None


class _NoShards:
    def shards_between(self, split: str, first: int, stop: int) -> list[ShardInfo]:
        raise AssertionError("the order of windows needs no shard")


def main() -> int:
    """The process: its job from standard input; the exit code."""
    # Whatever else prints, a library in C or a child among them, must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = ProducerJob(**json.loads(sys.stdin.readline()))
    producer = Producer(job, sys.stdin, answers)
    try:
        producer.run()
    except UserError as error:
        producer.answer({"kind": "error", "error": str(error)})
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
