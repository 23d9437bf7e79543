"""The cleaning pass over a corpus: tasks that clean a partition each, and partitions of what is left.

A partition's work is three files under `clean/work/`: the documents that are left, as compressed
JSON lines (already cut and placed, so that they are what shards hold), their keys for the search of
duplicates, and, last, a record with the checksums of both. A task finds them and does nothing.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from spikescale.data_pipeline.clean.contamination import load_index, write_index
from spikescale.data_pipeline.clean.duplicates import KEPT, RULES, document_key, join, key_type
from spikescale.data_pipeline.clean.record import FOLDER, Record, read_record, record_path
from spikescale.data_pipeline.clean.settings import CleanSettings
from spikescale.data_pipeline.clean.stages import Stage, make_stages
from spikescale.data_pipeline.placed import placed_documents
from spikescale.data_pipeline.pools import Listener, Pool
from spikescale.data_pipeline.quarantine import FACT as QUARANTINE
from spikescale.data_pipeline.quarantine import Quarantine, bad_records_intact, quarantine_intact
from spikescale.data_pipeline.shards import finished_shard
from spikescale.data_pipeline.sources import Document, Partition
from spikescale.data_pipeline.sources.base import WrappedPartition
from spikescale.data_pipeline.split import SPLITS, SplitSettings
from spikescale.errors import UserError
from spikescale.files import (
    fsync_file,
    fsync_folder,
    read_json,
    room_needed,
    sha256_file,
    temporary_path,
    write_json,
)

WORK = "work"
CLUSTERS = "duplicates.json"
LEVEL = 3  # of zstandard

Report = Callable[[int, int, int], None]


def work_folder(folder: Path) -> Path:
    """Where the cleaning pass keeps its files until the shards are finished."""
    return folder / FOLDER / WORK


@dataclass(frozen=True)
class CleanTask:
    """Clean one partition.

    Attributes:
        folder: of the prepared data. number: the partition's.
        index, index_sha256: the n-grams of evaluation sets, where some were given.
        request: digest of the whole request.
        max_bad_share: see `quarantine.Quarantine`.
    """

    folder: Path
    number: int
    partition: Partition
    split: SplitSettings
    settings: CleanSettings
    limit: int | None
    index: Path | None
    index_sha256: str
    request: str
    max_bad_share: float | None = None

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """The files of documents and of keys, and the record."""
        stem = work_folder(self.folder) / f"{self.number:05d}"
        return stem.with_suffix(".jsonl.zst"), stem.with_suffix(".npy"), stem.with_suffix(".json")

    def run(self, report: Report) -> None:
        """Write the partition's files, unless they are there and intact."""
        with room_needed(self.folder):
            self._run(report)

    def _run(self, report: Report) -> None:
        texts, keys, record_file = self.paths
        done = self.finished()
        if done:
            report(sum(done["lengths"]["before"].values()), 0, self.partition.size_bytes)
            return
        record_file.unlink(missing_ok=True)
        facts = {"request": self.request, "number": self.number, "partition": self.partition.label}
        record = Record(facts)
        stages = make_stages(self.settings, load_index(self.index, self.index_sha256) if self.index else None)
        for stage in stages:
            record.begin_stage(stage.name)
        temporaries = (temporary_path(texts), temporary_path(keys))
        quarantine = Quarantine(self.folder, self.number, self.partition, self.max_bad_share)
        try:
            rows = self._write_documents(quarantine, temporaries[0], stages, record, report)
            record.facts.update(quarantine.finish())
            with temporaries[1].open("wb") as file:
                np.save(file, np.array(rows, dtype=key_type(self.settings)))
            for temporary, path in zip(temporaries, (texts, keys), strict=True):
                fsync_file(temporary)
                temporary.replace(path)
            fsync_folder(texts.parent)
        finally:
            quarantine.abandon()
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)
        record.facts["files"] = self._sums()
        record.write(record_file)

    def finished(self) -> dict[str, Any]:
        """The record, if it and the files are there and intact; else empty."""
        content = read_record(self.paths[2], self.request)
        if content is None or content["files"] != self._sums():
            return {}
        return content if bad_records_intact(self.folder, self.number, content.get(QUARANTINE)) else {}

    def _sums(self) -> list[str]:
        return [sha256_file(path) if path.exists() else "" for path in self.paths[:2]]

    def _write_documents(
        self, partition: Partition, path: Path, stages: Sequence[Stage], record: Record, report: Report
    ) -> list[tuple[Any, ...]]:
        import zstandard

        rows = []
        cleaned = _Cleaned(partition, stages, record, self.limit, report)
        with (
            path.open("wb") as file,
            zstandard.ZstdCompressor(level=LEVEL).stream_writer(file, closefd=False) as writer,
        ):
            for placed in placed_documents(cleaned, self.split):
                line = json.dumps([placed.text, placed.place, placed.metadata])
                writer.write(line.encode("ascii") + b"\n")
                rows.append(document_key(placed.text, placed.split, placed.digest, self.settings))
        return rows


class _Cleaned:
    """A partition's documents after the stages; what is dropped goes into the record."""

    def __init__(
        self,
        partition: Partition,
        stages: Sequence[Stage],
        record: Record,
        limit: int | None,
        report: Report,
    ) -> None:
        self.label, self.size_bytes, self.split = partition.label, partition.size_bytes, partition.split
        self._partition = partition
        self._stages = stages
        self._record = record
        self._limit = limit
        self._report = report

    def documents(self) -> Iterator[Document]:
        for number, document in enumerate(self._partition.documents()):
            if self._limit is not None and number >= self._limit:
                return
            cleaned = self._clean(document)
            self._report(1, 0, len(document.text))
            if cleaned is not None:
                yield cleaned

    def _clean(self, document: Document) -> Document | None:
        self._record.arrived(document.text)
        text = document.text
        for stage in self._stages:
            if stage.name == "evaluation" and self.split not in (None, "train"):
                # A source's own valid and test splits are not trained on, and may be those very sets.
                self._record.passed(stage.name, len(text), len(text))
                continue
            verdict = stage.apply(text)
            if verdict.language:
                self._record.languages[verdict.language] += 1
            if verdict.rule:
                self._record.dropped(stage.name, verdict.rule, text, document.place)
                return None
            self._record.passed(stage.name, len(text), len(verdict.text), verdict.text != text)
            text = verdict.text
        return document._replace(text=text)


@dataclass(frozen=True)
class CleanedPartition(WrappedPartition):
    """A partition that reads the documents which the cleaning pass left, without the duplicates.

    Attributes:
        inner: the partition that was cleaned. texts: the file of its documents.
        fates, keepers: of each document there, see `duplicates.Join`; empty when none were sought.
    """

    folder: Path
    number: int
    texts: Path
    settings: CleanSettings
    fates: np.ndarray = field(repr=False)
    keepers: np.ndarray = field(repr=False)
    record: Record | None = None

    def documents(self) -> Iterator[Document]:
        """See Partition. Where `record` is set, duplicates are counted in it."""
        from spikescale.data_pipeline.sources.streams import read_lines

        for position, line in enumerate(read_lines(self.texts)):
            text, place, metadata = json.loads(line.content)
            document = Document(text, place, tuple((key, value) for key, value in metadata))
            fate = int(self.fates[position]) if len(self.fates) else KEPT
            if self.record is not None and self.settings.joins:
                self._count(document, position, fate)
            if fate == KEPT:
                yield document

    def _count(self, document: Document, position: int, fate: int) -> None:
        assert self.record is not None
        if fate == KEPT:
            self.record.passed("duplicates", len(document.text), len(document.text))
            return
        partition, number = self.keepers[position].tolist()
        note = f"kept instead: document {number} of partition {partition}"
        self.record.dropped("duplicates", RULES[fate], document.text, document.place, note)

    def recording(self) -> tuple["CleanedPartition", Record]:
        """This partition with a record that goes on from that of the cleaning pass, and the record."""
        path = self.texts.with_suffix("").with_suffix(".json")
        content = read_record(path)
        if content is None:
            raise UserError(f"{path}: missing or damaged; run the command again")
        record = Record({key: content[key] for key in ("request", "number", "partition")}, content)
        if self.settings.joins:
            record.begin_stage("duplicates")
        if self.settings.max_unknown_share is not None:
            record.begin_stage("unknown")
        return replace(self, record=record), record

    def quarantined(self) -> dict[str, Any]:
        """What the cleaning pass noted of the partition's bad records, for the sidecars."""
        content = read_record(self.texts.with_suffix("").with_suffix(".json")) or {}
        return {QUARANTINE: content[QUARANTINE]} if QUARANTINE in content else {}

    def finished_record(self) -> str:
        """The checksum of the finished record, or `none` when there is none that is intact."""
        content = read_record(record_path(self.folder, self.number))
        return "none" if content is None else str(content["sha256"])


def clean_corpus(
    folder: Path,
    partitions: Sequence[Partition],
    limits: Sequence[int | None],
    split: SplitSettings,
    settings: CleanSettings,
    request: str,
    pool: Pool,
    listener: Listener,
    max_bad_share: float | None = None,
) -> list[Partition]:
    """Clean every partition on the pool, find duplicates, and return partitions of what is left.

    Raises UserError for settings that name something unknown, and when nothing is left.
    """
    make_stages(replace(settings, evaluation_sets=()), None)  # what is wrong with them is said at once
    work = work_folder(folder)
    work.mkdir(parents=True, exist_ok=True)
    index, index_sha256 = None, ""
    if settings.evaluation_sets:
        index = work / "evaluation.npz"
        index_sha256 = write_index(settings.evaluation_sets, settings.evaluation_ngram, index)
    tasks = [
        CleanTask(
            folder, number, partition, split, settings, limit, index, index_sha256, request, max_bad_share
        )
        for number, (partition, limit) in enumerate(zip(partitions, limits, strict=True))
    ]
    pool.run(tasks, listener)
    empty = np.zeros(0, dtype=np.uint8)
    fates, keepers = [empty] * len(tasks), [empty] * len(tasks)
    if settings.joins:
        joined = join([np.load(task.paths[1], mmap_mode="r") for task in tasks], settings)
        fates, keepers = joined.fates, joined.keepers
        write_json(folder / FOLDER / CLUSTERS, joined.clusters())
    _require_some(tasks, fates)
    return [
        CleanedPartition(
            inner=partition,
            folder=folder,
            number=number,
            texts=work / f"{number:05d}.jsonl.zst",
            settings=settings,
            fates=fates[number],
            keepers=keepers[number],
        )
        for number, partition in enumerate(partitions)
    ]


def _require_some(tasks: Sequence[CleanTask], fates: Sequence[np.ndarray]) -> None:
    documents, dropped = 0, Counter[str]()
    for task, fate in zip(tasks, fates, strict=True):
        content = task.finished()
        if (fate == KEPT).any() or np.load(task.paths[1], mmap_mode="r").shape[0] > len(fate):
            return
        documents += sum(content["lengths"]["before"].values())
        for stage in content["stages"]:
            dropped.update({rule: counts["documents"] for rule, counts in stage["dropped"].items()})
    if documents:
        rules = ", ".join(f"{rule} dropped {count}" for rule, count in dropped.most_common())
        raise UserError(f"cleaning left none of {documents} documents: {rules}")


def cleaning_is_finished(folder: Path, partitions: int, request: str, quarantined: bool) -> bool:
    """Whether every shard and record of this request is there and intact, so that no pass is needed."""
    for number in range(partitions):
        record = read_record(record_path(folder, number), request)
        if record is None:
            return False
        facts = {"request": request, "record_sha256": record["sha256"]}
        if any(finished_shard(folder, split, number, facts) is None for split in SPLITS):
            return False
        if quarantined and not quarantine_intact(folder, number):
            return False
    return True


def remove_work(folder: Path) -> None:
    """Remove what only unfinished preparations need."""
    shutil.rmtree(work_folder(folder), ignore_errors=True)


def cleaning_summary(folder: Path) -> dict[str, Any] | None:
    """The clusters of duplicates that were found, or None when none were sought."""
    path = folder / FOLDER / CLUSTERS
    return dict(read_json(path)) if path.exists() else None
