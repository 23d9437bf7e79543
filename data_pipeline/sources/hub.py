"""Data sets of the HF hub (or any files that `datasets` can stream) as a source."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from spikescale.data_pipeline.sources.base import Document, Partition, ReadOptions, bad_record
from spikescale.data_pipeline.sources.readers import cut_text
from spikescale.data_pipeline.sources.records import Fault, row_text, with_source
from spikescale.errors import UserError

Metadata = tuple[tuple[str, str], ...]
Row = tuple[int, str | Fault, Metadata]  # its number, its text, what is known of it


@dataclass(frozen=True)
class HubData:
    """One split of one data set, as `datasets.load_dataset` names it.

    Attributes:
        path: the data set's name on the hub, or a loader's name (`json`, `parquet`) with `data_files`.
        config, split, revision, data_files: as in `load_dataset`.
        text_key: the column with the text.
        row_start: a regular expression; where given, rows are joined until one matches it, for data
            sets whose rows are lines of longer documents.
        split_on: as in ReadOptions, applied to each text.
        bad_records, max_record_bytes: as in ReadOptions, of rows.
        metadata_keys: as in ReadOptions; name: what `source` is there. Of joined rows, the first one's.
    """

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    text_key: str = "text"
    row_start: str | None = None
    split_on: str = "file"
    metadata_keys: tuple[str, ...] = ()
    name: str = ""
    bad_records: str = "refuse"
    max_record_bytes: int | None = None

    def described(self) -> dict[str, Any]:
        """What decides the documents, as plain JSON."""
        described = {**vars(self), "data_files": list(self.data_files)}
        described["metadata_keys"] = list(self.metadata_keys)
        if not self.metadata_keys:
            del described["metadata_keys"], described["name"]
        for key, default in (("bad_records", "refuse"), ("max_record_bytes", None)):
            if described[key] == default:
                del described[key]
        return described

    @property
    def title(self) -> str:
        """Name, configuration and split, for messages."""
        return " ".join(part for part in (self.path, self.config, self.split) if part)

    def load(self) -> Any:
        """The streaming data set. Raises UserError, in one line, when it cannot be opened."""
        import datasets

        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(
                self.path,
                name=self.config,
                split=self.split,
                revision=self.revision,
                data_files=list(self.data_files) or None,
                streaming=True,
            )
        except Exception as error:  # the library raises requests', fsspec's and its own errors
            raise _as_user_error(self, error) from None


@dataclass(frozen=True)
class HubPartition:
    """One of the data set's own shards."""

    data: HubData
    index: int
    count: int
    split: str | None = None
    size_bytes: int = field(default=0)

    @property
    def label(self) -> str:
        """The data set and the shard's number."""
        return f"{self.data.title} [{self.index}/{self.count}]"

    def documents(self) -> Iterator[Document]:
        """The documents of this shard in order."""
        rows = self.data.load()
        if self.count > 1:
            rows = rows.shard(num_shards=self.count, index=self.index)
        keys = self.data.metadata_keys
        options = ReadOptions(bad_records=self.data.bad_records)
        for number, text, metadata in self._joined(self._texts(iter(rows))):
            if isinstance(text, Fault):
                place = f"{self.label}, row {number}"
                bad = bad_record(options, place, text.kind, text.reason, b"", row=number)
                yield bad._replace(metadata=(("file", self.label), *bad.metadata))
                continue
            for piece in cut_text(text, self.data.split_on):
                document = Document(piece, f"{self.label}, row {number}", metadata)
                yield with_source(document, keys, self.data.name or self.data.path)

    def _texts(self, rows: Iterator[dict[str, Any]]) -> Iterator[Row]:
        for number in itertools.count(1):
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise _as_user_error(self.data, error) from None
            found = row_text(row, self._reading)
            yield (number, found, ()) if isinstance(found, Fault) else (number, *found)

    @property
    def _reading(self) -> ReadOptions:
        return ReadOptions(
            text_key=self.data.text_key,
            metadata_keys=self.data.metadata_keys,
            max_record_bytes=self.data.max_record_bytes,
        )

    def _joined(self, texts: Iterator[Row]) -> Iterator[Row]:
        if self.data.row_start is None:
            yield from texts
            return
        starts = re.compile(self.data.row_start)
        first, metadata, parts = 1, Metadata(), list[str]()
        for number, text, own in texts:
            if isinstance(text, Fault):
                yield number, text, own
                continue
            if parts and starts.match(text):
                yield first, "".join(parts), metadata
                parts = []
            if not parts:
                first, metadata = number, own
            parts.append(text)
        if parts:
            yield first, "".join(parts), metadata


class HubSource:
    """A hub data set whose partitions are the data set's own shards.

    `parts` pairs each of its splits with the split here that it becomes (None: by hash, or as `split_by`
    says).
    """

    def __init__(
        self, name: str, parts: list[tuple[HubData, str | None]], split_by: str | None = None
    ) -> None:
        self.name = name
        self.split_by = split_by
        self._parts = parts

    def identity(self) -> dict[str, Any]:
        """Everything that `load_dataset` is called with."""
        return {"hub": [{**data.described(), "as": split} for data, split in self._parts]}

    def partitions(self) -> list[Partition]:
        """One partition a shard of the data set. Needs the network, unless the files are local."""
        partitions: list[Partition] = []
        for data, split in self._parts:
            # Joined rows must not be torn apart between shards.
            count = 1 if data.row_start else max(1, int(data.load().num_shards))
            partitions += [HubPartition(data, index, count, split) for index in range(count)]
        return partitions


def _as_user_error(data: HubData, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    words = ("Couldn't reach", "offline", "Failed to resolve", "name resolution", "Connection", "connect")
    if isinstance(error, ConnectionError) or any(word in reason for word in words):
        return UserError(
            f"{data.title}: the HF hub cannot be reached from here ({reason[:120]});"
            " use a local or built-in source"
        )
    return UserError(f"{data.title}: `datasets` cannot read it ({type(error).__name__}: {reason[:300]})")
