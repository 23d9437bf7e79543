"""Bad records: taken out of a partition's documents, written down, counted, and held against a threshold.

Each partition's bad records are the lines of `quarantine-<number>.jsonl`, which gets its name before the
partition's sidecars do; the sidecars keep its counts and checksum, so that a partition that was half done
is repeated. `quarantine.json` sums up the job. Neither changes the manifest: the tokens are those of the
input without the bad records.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from spikescale.data_pipeline.shards import shard_path
from spikescale.data_pipeline.sources import Document, Partition
from spikescale.data_pipeline.sources.base import WrappedPartition
from spikescale.data_pipeline.split import SPLITS
from spikescale.errors import UserError
from spikescale.files import (
    fsync_file,
    fsync_folder,
    read_json,
    sha256_file,
    temporary_path,
    write_json,
)

SUMMARY = "quarantine.json"
PATTERN = "quarantine-*.jsonl"
FACT = "quarantine"  # the key in the sidecars
NUMBERS = ("offset", "line", "row", "counted_from", "records")


@dataclass
class Tally:
    """What was counted in a partition, or in a whole job.

    Attributes:
        records: read, good and bad (of an unreadable rest of a file, as many as are known, at least 1).
        bad: how many of them were bad.
        entries: lines written; an unreadable rest of a file is one.
        kinds: bad records of each kind.
        sha256: of the file of bad records ("" where there is none).
    """

    records: int = 0
    bad: int = 0
    entries: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    sha256: str = ""

    @property
    def share(self) -> float:
        """Bad records as a share of all."""
        return self.bad / self.records if self.records else 0.0


@dataclass(frozen=True)
class SoundPartition(WrappedPartition):
    """A partition without its bad records, for passes that do not write them down."""

    def documents(self) -> Iterator[Document]:
        """The documents without a fault."""
        return (document for document in self.inner.documents() if not document.fault)


class Quarantine:
    """Takes the bad records out of one partition. It stands where the partition would.

    Args:
        folder, number, partition: which one.
        max_share: of bad records; a single entry is always allowed, the whole job decides about it.
            None refuses every bad record.
    """

    def __init__(self, folder: Path, number: int, partition: Partition, max_share: float | None) -> None:
        self.path = quarantine_path(folder, number)
        self.tally = Tally()
        self.label = partition.label
        self.size_bytes = partition.size_bytes
        self.split = partition.split
        self._partition = partition
        self._max_share = max_share
        self._temporary = temporary_path(self.path)
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._first = ""

    def documents(self) -> Iterator[Document]:
        """The good documents; the others are written down on the way."""
        if self._max_share is None:
            for document in self._partition.documents():
                if document.fault:
                    raise UserError(f"{document.place}: {document.fault}")
                yield document
            return
        for document in self._partition.documents():
            if document.fault:
                self._add(document)
            else:
                yield document
                self.tally.records += 1

    def _add(self, document: Document) -> None:
        known: dict[str, Any] = dict(document.metadata)
        known.update({name: int(known[name]) for name in NUMBERS if name in known})
        known.setdefault("file", document.place)
        kind, count = str(known.setdefault("kind", "other")), int(known.get("records", 1))
        line = json.dumps({**known, "reason": document.fault}, sort_keys=True).encode() + b"\n"
        if self._file is None:
            self._file = self._temporary.open("wb")
            self._first = f"{document.place}: {document.fault}"
        self._file.write(line)
        self._digest.update(line)
        self.tally.records += count
        self.tally.bad += count
        self.tally.entries += 1
        self.tally.kinds[kind] = self.tally.kinds.get(kind, 0) + count

    def finish(self) -> dict[str, Any]:
        """Give the file its name and return what the sidecars are to keep: nothing where all are refused.

        Raises UserError, after the file has its name, when there are more than allowed.
        """
        if self._max_share is None:
            return {}
        if self._file is None:
            self.path.unlink(missing_ok=True)
        else:
            self._file.close()
            fsync_file(self._temporary)
            self._temporary.replace(self.path)
            fsync_folder(self.path.parent)
            self.tally.sha256 = self._digest.hexdigest()
        if self.tally.entries > 1:
            check_share(self.tally, self._max_share, f"partition {self.label}", self._first, self.path)
        return {FACT: asdict(self.tally)}

    def abandon(self) -> None:
        """Remove the unfinished file."""
        if self._file is not None:
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def quarantine_path(folder: Path, number: int) -> Path:
    """Where the bad records of a partition are."""
    return folder / f"quarantine-{number:05d}.jsonl"


def check_share(tally: Tally, max_share: float, what: str, first: str, path: Path) -> None:
    """Raises UserError when `tally` has a larger share of bad records than `max_share`."""
    if tally.share > max_share:
        raise UserError(
            f"{what}: {tally.bad} of {tally.records} records are bad, a share of {tally.share:.4g}; "
            f"allowed is --max-bad-share {max_share:g}; they are in {path}"
            + (f", first {first}" if first else "")
        )


def quarantine_intact(folder: Path, number: int) -> bool:
    """Whether the bad records of a partition are as its sidecars say."""
    try:
        stored = [asdict(_stored(folder, number, split)) for split in SPLITS]
    except (UserError, KeyError, TypeError):
        return False
    return all(bad_records_intact(folder, number, tally) for tally in stored)


def bad_records_intact(folder: Path, number: int, fact: Mapping[str, Any] | None) -> bool:
    """Whether the file of bad records of a partition is the one of `fact`; no fact expects nothing."""
    path = quarantine_path(folder, number)
    return fact is None or fact["sha256"] == (sha256_file(path) if path.exists() else "")


def summarise(folder: Path, partitions: int, max_share: float) -> Tally:
    """Add up the partitions' sidecars and write `quarantine.json`.

    Raises UserError, after that, when more than `max_share` of the job's records are bad.
    """
    total, kinds = Tally(), Counter[str]()
    where: dict[str, int] = {}
    for number in range(partitions):
        tally = _stored(folder, number, SPLITS[0])
        total.records += tally.records
        total.bad += tally.bad
        total.entries += tally.entries
        kinds.update(tally.kinds)
        if tally.entries:
            where[quarantine_path(folder, number).name] = tally.entries
    total.kinds = dict(sorted(kinds.items()))
    described = {name: value for name, value in asdict(total).items() if name != "sha256"}
    write_json(folder / SUMMARY, {**described, "share": total.share, "files": where})
    check_share(total, max_share, "the whole job", "", folder / PATTERN)
    return total


def describe_quarantine(folder: Path) -> str | None:
    """One line on the bad records of prepared data; None where they were refused."""
    if not (folder / SUMMARY).exists():
        return None
    content = read_json(folder / SUMMARY)
    if not content["bad"]:
        return f"no bad records among {content['records']:,}"
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in content["kinds"].items())
    return (
        f"{content['bad']:,} bad records of {content['records']:,} ({content['share']:.2%}) left out: {kinds}"
        f"; see {folder / PATTERN}"
    )


def _stored(folder: Path, number: int, split: str) -> Tally:
    content: Mapping[str, Any] = read_json(shard_path(folder, split, number).with_suffix(".json"))
    return Tally(**content[FACT])
