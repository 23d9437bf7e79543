"""A data set that is read while it is made: its shards appear one by one, with their sidecars.

The folder is that of `data prepare`. Beside the shards it holds `live.json`, what is known before the first
shard, and after a failure `live-failed.json`, which everyone who waits finds.
"""

import errno
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikescale.data_pipeline.manifest import (
    FILE,
    TOKENIZER_FOLDER,
    TokenizerInfo,
    Totals,
    live_identity,
    total,
)
from spikescale.data_pipeline.shards import ShardInfo, finished_shard, shard_path
from spikescale.errors import UserError
from spikescale.files import read_json, write_json

HEAD = "live.json"
FAILED = "live-failed.json"
LOG = "producer.log"
VERSION = 1
POLL_SECONDS = 0.1
UNUSABLE_SECONDS = 15.0  # of looking again, before a damaged shard is given up


@dataclass(frozen=True)
class Head:
    """What is known of a live data set before its shards.

    Attributes:
        request: digest of all that it depends on.
        source: the source's name. partitions: how many; shard numbers are below it.
        dtype, tokenizer: of the shards.
        lead: so many of the first partitions were made before anything else, for validation.
    """

    request: str
    source: str
    partitions: int
    dtype: str
    tokenizer: TokenizerInfo
    lead: int

    def write(self, folder: Path) -> None:
        """Publish it."""
        described = {**vars(self), "tokenizer": vars(self.tokenizer), "version": VERSION}
        write_json(folder / HEAD, described)

    @classmethod
    def read(cls, folder: Path) -> "Head":
        """Read it. Raises UserError when it is missing or of another version."""
        path = folder / HEAD
        content = read_json(path)
        if not isinstance(content, Mapping) or content.get("version") != VERSION:
            raise UserError(f"{path}: not a live data set of version {VERSION}")
        values = {key: value for key, value in content.items() if key != "version"}
        try:
            return cls(**{**values, "tokenizer": TokenizerInfo(**values["tokenizer"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error})") from None


class LiveDataset:
    """The reader's view of a data set that is being made; takes the place of a `Manifest`.

    Args:
        folder: where the shards appear.
        needs: is told, before waiting, which shard numbers [first, stop) are to come next.

    Attributes:
        waited: seconds that this process has waited for its shards. waiting: it does so now.
    """

    complete = False

    def __init__(self, folder: Path, needs: Callable[[int, int], None] = lambda first, stop: None) -> None:
        self.folder = folder
        self._head = Head.read(folder)
        self._needs = needs
        self._found: dict[tuple[str, int], ShardInfo] = {}
        self._interrupted = threading.Event()
        self._lead: dict[str, list[ShardInfo]] = {}
        self.waited, self.waiting = 0.0, False

    @property
    def partitions(self) -> int:
        """How many partitions there will be."""
        return self._head.partitions

    @property
    def source(self) -> str:
        """The source's name."""
        return self._head.source

    @property
    def dtype(self) -> np.dtype:
        """Of the token files."""
        return np.dtype(self._head.dtype)

    @property
    def tokenizer(self) -> TokenizerInfo:
        """Facts of the tokenizer saved in `tokenizer_folder`."""
        return self._head.tokenizer

    @property
    def tokenizer_folder(self) -> Path:
        """Where `load_tokenizer` finds the tokenizer."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def sha256(self) -> str:
        """Identifies the data set by the request that it is made for."""
        return live_identity(self._head.request)

    def prefix_identity(self, partitions: int) -> str:
        """See `Manifest.prefix_identity`: a live data set is known as a whole only."""
        return self.sha256

    def has_prefix(self, identity: str, partitions: int) -> bool:
        """Whether it is the data set with this identity."""
        return identity == self.sha256 and partitions == self.partitions

    def shards(self, split: str) -> list[ShardInfo]:
        """The shards of the first `lead` partitions, which are there from the start: for validation."""
        if split not in self._lead:
            # Not asked for: the look-ahead would count from them.
            self._lead[split] = self._wait_for(split, 0, self._head.lead)
        return self._lead[split]

    def totals(self, split: str) -> Totals:
        """Sums over `shards(split)`."""
        return total(self.shards(split))

    def shards_between(self, split: str, first: int, stop: int) -> list[ShardInfo]:
        """The shards of a split that hold tokens, with numbers in [first, stop); waits until they are made.

        Raises UserError when making them has failed, or the wait is interrupted.
        """
        self._needs(first, stop)
        return self._wait_for(split, first, stop)

    def _wait_for(self, split: str, first: int, stop: int) -> list[ShardInfo]:
        try:
            self._find(split, [number for number in range(first, stop) if (split, number) not in self._found])
        finally:
            self.waiting = False
        found = (self._found[split, number] for number in range(first, stop))
        return [shard for shard in found if shard.tokens]

    def _find(self, split: str, missing: list[int]) -> None:
        unusable = 0.0  # seconds that a shard has been there, or should be, and is not what it should be
        while missing:
            # In the order in which they are made: the first one tells whether to look for the others.
            if self._look_for(split, missing[0]):
                missing.pop(0)
                unusable = 0.0
                continue
            self._check()
            path = shard_path(self.folder, split, missing[0])
            if path.with_suffix(".json").exists() or (self.folder / FILE).exists():
                unusable += POLL_SECONDS
                if unusable > UNUSABLE_SECONDS:
                    raise UserError(
                        f"{path}: is missing or not what its sidecar says; remove {path.with_suffix('.json')}"
                        " and start again, then it is made anew"
                    )
            self.waiting = True
            time.sleep(POLL_SECONDS)
            self.waited += POLL_SECONDS

    def interrupt(self, on: bool) -> None:
        """Have whoever waits give up (True), or allow waiting again (False)."""
        if on:
            self._interrupted.set()
        else:
            self._interrupted.clear()

    def _look_for(self, split: str, number: int) -> bool:
        # Every byte is read once, here: what came back from the disk is what was written.
        try:
            shard = finished_shard(self.folder, split, number, {"request": self._head.request})
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):  # renamed while it was looked at
                return False
            raise UserError(f"{shard_path(self.folder, split, number)}: cannot be read ({error})") from None
        if shard is None:
            return False
        self._found[split, number] = shard
        return True

    def _check(self) -> None:
        if self._interrupted.is_set():
            raise UserError(f"{self.folder}: the wait for its shards was interrupted")
        failure = read_failure(self.folder)
        if failure is not None:
            raise UserError(failure)


def write_failure(folder: Path, line: str) -> None:
    """Tell everyone who waits for shards why there will be none."""
    write_json(folder / FAILED, {"error": line})


def read_failure(folder: Path) -> str | None:
    """The line that `write_failure` left, if any."""
    path = folder / FAILED
    if not path.exists():
        return None
    content: Any = read_json(path)
    return str(content.get("error", "")) if isinstance(content, Mapping) else str(content)
