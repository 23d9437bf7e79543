"""What every source of text offers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from spikescale.errors import UserError

QUARANTINED_RECORD_MIB = 64.0

EXCERPT_BYTES = 200  # of a bad record, that are shown


class Document(NamedTuple):
    """One text, and the place it came from (file and line or row) for messages.

    Attributes:
        text: the document.
        place: where it was read.
        metadata: what is known of it beside its text, such as (("category", "physics"),), in a fixed order.
        fault: why the record is no document, in a few words; empty for a good one.
    """

    text: str
    place: str
    metadata: tuple[tuple[str, str], ...] = ()
    fault: str = ""


class Partition(Protocol):
    """A fixed part of a source: the unit of work, which becomes one shard a split. Picklable.

    `documents()` yields the same documents in the same order whenever and wherever it is called.
    """

    @property
    def label(self) -> str:
        """A short name for sidecars and messages, without machine-specific folders."""
        ...

    @property
    def size_bytes(self) -> int:
        """Stored bytes to read, for the estimate of the time left; 0 when unknown."""
        ...

    @property
    def split(self) -> str | None:
        """The split that all its documents belong to, or None: decided by each document's hash."""
        ...

    def documents(self) -> Iterator[Document]:
        """The documents. Raises UserError naming file and line where the input is malformed."""
        ...


@dataclass(frozen=True)
class WrappedPartition:
    """A partition that stands for another one and reads it, or what became of it, in its own way."""

    inner: Partition

    @property
    def label(self) -> str:
        """As of the partition."""
        return self.inner.label

    @property
    def size_bytes(self) -> int:
        """As of the partition."""
        return self.inner.size_bytes

    @property
    def split(self) -> str | None:
        """As of the partition."""
        return self.inner.split


class Source(Protocol):
    """A named collection of text that can list its partitions."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What the content depends on, as plain JSON: when it differs, the prepared data would differ."""
        ...

    def partitions(self) -> list[Partition]:
        """The partitions in number order. May fetch what is missing; raises UserError when it cannot."""
        ...


@dataclass(frozen=True)
class SourceInfo:
    """One line of `spikescale data list`."""

    name: str
    kind: str  # built-in, hub, files or plug-in
    summary: str
    size: str
    licence: str
    needs: str  # what it takes to get it


@dataclass(frozen=True)
class ReadOptions:
    """How files are read into documents.

    Attributes:
        format: text, jsonl or parquet; None: by the file's suffix.
        text_key: the key (jsonl) or column (parquet) that holds the text.
        split_on: for text files: `file` (a file is a document), `line`, `blank-line`, or a regular
            expression at whose matches the text is cut (a lookahead cuts without removing anything).
        encoding: of text files and JSON lines.
        invalid_bytes: `refuse` bytes that are not in that encoding, or `replace` them by U+FFFD.
        partition_bytes: about how many stored bytes make a partition.
        metadata_keys: keys (jsonl) or columns (parquet) that become the documents' metadata, where a record
            has them; `source` stands for the source's name in records that have no such key.
        bad_records: `refuse` a record that cannot be read, or give it as a document with a `fault`.
        max_record_bytes: a longer record (JSON line, line, text file or piece of one, parquet value) is a
            bad one; None: none is too long.
    """

    format: str | None = None
    text_key: str = "text"
    split_on: str = "file"
    encoding: str = "utf-8"
    invalid_bytes: str = "refuse"
    partition_bytes: int = 32 << 20
    metadata_keys: tuple[str, ...] = ()
    bad_records: str = "refuse"
    max_record_bytes: int | None = None

    def described(self) -> dict[str, Any]:
        """The options as plain JSON; what is newer only where it is not the default."""
        newer = {"metadata_keys": (), "bad_records": "refuse", "max_record_bytes": None}
        options = {name: value for name, value in vars(self).items() if newer.get(name, self) != value}
        if self.metadata_keys:
            options["metadata_keys"] = list(self.metadata_keys)
        return options


def chosen_options(
    bad_records: str,
    metadata_keys: Sequence[str],
    partition_mib: float | None,
    max_record_mib: float | None,
    **plain: str | None,
) -> dict[str, Any]:
    """The fields of `ReadOptions` that a user chose, for `open_source`; the others are the catalogue's.

    plain: fields by name, None where nothing was chosen. A record is too long from 64 MiB on when bad ones
    are quarantined and nothing else was said. Raises UserError for sizes that are not positive.
    """
    chosen: dict[str, Any] = {name: value for name, value in plain.items() if value is not None}
    if metadata_keys:
        chosen["metadata_keys"] = tuple(metadata_keys)
    if bad_records == "quarantine":
        chosen["bad_records"] = bad_records
        max_record_mib = QUARANTINED_RECORD_MIB if max_record_mib is None else max_record_mib
    sizes = {"partition_bytes": partition_mib, "max_record_bytes": max_record_mib}
    for name, mebibytes in sizes.items():
        if mebibytes is not None:
            if mebibytes <= 0:
                option = name.replace("_", "-").removesuffix("bytes")
                raise UserError(f"--{option}mib {mebibytes}: must be positive")
            chosen[name] = max(1, int(mebibytes * (1 << 20)))
    return chosen


def bad_record(
    options: ReadOptions, place: object, kind: str, reason: str, excerpt: bytes, **facts: int
) -> Document:
    """The document that stands for a record that cannot be read, when `options` say to quarantine it.

    Args:
        place: where it is, for messages.
        kind: encoding, json, schema, surrogate, too-long, truncated or damaged.
        reason: what is wrong with it.
        excerpt: how it begins.
        facts: `offset` (bytes) and `line`, or `row`; `records`, when it stands for more than one.

    Raises UserError when they say to refuse it.
    """
    if options.bad_records == "refuse":
        raise UserError(f"{place}: {reason}")
    described = {"kind": kind, **{name: str(value) for name, value in facts.items()}}
    # Bytes that are not UTF-8 are escaped, so that any record can be written down.
    described["excerpt"] = excerpt[:EXCERPT_BYTES].decode("utf-8", "backslashreplace")
    return Document("", str(place), tuple(described.items()), reason)
