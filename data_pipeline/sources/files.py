"""Files as a source, local or by URL: a file, a glob or a folder, cut into partitions of a chosen size."""

import glob
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.sources.base import Document, Partition, ReadOptions
from spikescale.data_pipeline.sources.parquet import open_parquet, read_parquet
from spikescale.data_pipeline.sources.readers import FORMATS, format_of, read_jsonl, read_text
from spikescale.data_pipeline.sources.records import with_source
from spikescale.data_pipeline.sources.streams import (
    COMPRESSED_SUFFIXES,
    DamagedInputError,
    FilePath,
    is_compressed,
)
from spikescale.data_pipeline.storage import is_url, list_files, local_path, shown
from spikescale.errors import UserError
from spikescale.files import sha256_text

LOCAL_FILES = "files"  # the name of a source of files that are given by their paths
READERS = {"text": read_text, "jsonl": read_jsonl, "parquet": read_parquet}


@dataclass(frozen=True)
class Piece:
    """A file, or the byte range (text, jsonl) or row-group range (parquet) [start, stop) of one."""

    path: FilePath
    name: str
    format: str
    size_bytes: int
    start: int = 0
    stop: int | None = None

    @property
    def label(self) -> str:
        """The file's relative name and the range."""
        return self.name if self.stop is None else f"{self.name}[{self.start}:{self.stop}]"

    @property
    def source(self) -> str:
        """The first folder of the relative name, or else the name without its suffixes."""
        folder, slash, _ = self.name.partition("/")
        return folder if slash else self.name.split(".")[0] or self.name


@dataclass(frozen=True)
class FilePartition:
    """Pieces of files that are read one after another."""

    pieces: tuple[Piece, ...]
    options: ReadOptions
    split: str | None = None
    source: str | None = None  # in the documents' metadata; None: each file's folder or name

    @property
    def label(self) -> str:
        """The first piece's label, and how many more there are."""
        more = len(self.pieces) - 1
        return self.pieces[0].label + (f" and {more} more" if more else "")

    @property
    def size_bytes(self) -> int:
        """Stored bytes of all pieces."""
        return sum(piece.size_bytes for piece in self.pieces)

    def documents(self) -> Iterator[Document]:
        """The documents of all pieces in order."""
        keys = self.options.metadata_keys
        for piece in self.pieces:
            documents = READERS[piece.format](piece.path, self.options, piece.start, piece.stop)
            if not keys and self.options.bad_records == "refuse":
                yield from documents  # none has a fault, and nothing is added to any
                continue
            name = self.source or piece.source
            for document in documents:
                if document.fault:
                    yield document._replace(metadata=(("file", piece.name), *document.metadata))
                else:
                    yield with_source(document, keys, name)


class FilesSource:
    """Files given by paths, globs and folders, read in the order of their names.

    Args:
        name: how the source is called in manifests.
        paths: files, globs (`**` allowed) and folders (searched recursively for known suffixes), or URLs
            of such.
        options: how files become documents.
        split: the split all of it belongs to, or None.
        split_by: how it is usually divided, hash or position; None: by hash.
        content_id: identifies the content where the files are known by a checksum; otherwise names,
            sizes and modification times (entity tags) do.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str | Path],
        options: ReadOptions,
        split: str | None = None,
        content_id: str | None = None,
        split_by: str | None = None,
    ) -> None:
        self.name = name
        self.split_by = split_by
        self.options = options
        self.split = split
        self._content_id = content_id
        self._files = [found for path in paths for found in expand_path(str(path), options)]

    def identity(self) -> dict[str, Any]:
        """Reading options and a digest of the files' names, sizes and times (or the given identity)."""
        if self._content_id is None:
            stats = [(name, _size(path), _version(path)) for path, name in self._files]
            content = sha256_text(repr(stats))
        else:
            content = self._content_id
        return {
            "files": len(self._files),
            "content": content,
            "split": self.split,
            **self.options.described(),
        }

    def partitions(self) -> list[Partition]:
        """Large files in ranges, small ones grouped, each about `partition_bytes` long."""
        partitions: list[Partition] = []
        group: list[Piece] = []
        target = self.options.partition_bytes
        for path, name in self._files:
            for piece in self._pieces(path, name):
                if group and sum(member.size_bytes for member in group) + piece.size_bytes > target:
                    partitions.append(self._partition(group))
                    group = []
                group.append(piece)
        partitions.append(self._partition(group))
        return partitions

    def _partition(self, group: list[Piece]) -> FilePartition:
        name = None if self.name == LOCAL_FILES else self.name
        return FilePartition(tuple(group), self.options, self.split, name)

    def _pieces(self, path: FilePath, name: str) -> list[Piece]:
        kind = self.options.format or format_of(path)
        if kind is None:
            allowed = ", ".join(sorted(FORMATS))
            raise UserError(f"{path}: cannot tell the format by its name; use --format, or one of {allowed}")
        size = _size(path)
        count = -(-size // self.options.partition_bytes)
        if count > 1 and not is_compressed(path):
            if kind == "parquet":
                try:
                    return self._row_group_pieces(path, name)
                except DamagedInputError:
                    if self.options.bad_records == "refuse":
                        raise
                    return [Piece(path, name, kind, size)]
            if kind == "jsonl" or self.options.split_on == "line":
                bounds = [size * number // count for number in range(count + 1)]
                return [
                    Piece(path, name, kind, high - low, low, high) for low, high in itertools.pairwise(bounds)
                ]
        return [Piece(path, name, kind, size)]

    def _row_group_pieces(self, path: FilePath, name: str) -> list[Piece]:
        metadata = open_parquet(path).metadata
        pieces, start, size = list[Piece](), 0, 0
        for group in range(metadata.num_row_groups):
            columns = metadata.row_group(group)
            size += sum(columns.column(index).total_compressed_size for index in range(metadata.num_columns))
            if size >= self.options.partition_bytes or group == metadata.num_row_groups - 1:
                pieces.append(Piece(path, name, "parquet", size, start, group + 1))
                start, size = group + 1, 0
        return pieces


def _size(path: FilePath) -> int:
    return path.stat().st_size if isinstance(path, Path) else path.size


def _version(path: FilePath) -> int | str:
    return path.stat().st_mtime_ns if isinstance(path, Path) else path.version


def expand_path(text: str, options: ReadOptions) -> Sequence[tuple[FilePath, str]]:
    """The files that a path, glob, folder or URL stands for, each with a name relative to what was given."""
    if is_url(text):
        local = local_path(text)
        return _expand_url(text, options) if local is None else expand_path(str(local), options)
    path = Path(text)
    if path.is_file():
        return [(path.absolute(), path.name)]
    if path.is_dir():
        found = [
            entry
            for entry in sorted(path.rglob("*"))
            if entry.is_file()
            and not any(part.startswith(".") for part in entry.relative_to(path).parts)
            and (options.format or format_of(entry))
        ]
        if not found:
            endings = ", ".join(sorted(FORMATS))
            raise UserError(
                f"{path}: no file ending in {endings} (each also with {', '.join(COMPRESSED_SUFFIXES)})"
            )
        return [(entry.absolute(), entry.relative_to(path).as_posix()) for entry in found]
    found_names = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - absolute patterns too
    matches = [Path(match) for match in found_names if Path(match).is_file()]
    if not matches:
        raise UserError(f"{text}: no such file or folder, and no file matches it as a pattern")
    return [(match.absolute(), match.name) for match in matches]


def _expand_url(url: str, options: ReadOptions) -> Sequence[tuple[FilePath, str]]:
    found = list_files(url)
    folder = len(found) > 1 or found[0][0].url.rstrip("/") != url.rstrip("/")
    if folder and "*" not in url:
        found = [(file, name) for file, name in found if options.format or format_of(file)]
        if not found:
            raise UserError(f"{shown(url)}: no file ending in {', '.join(sorted(FORMATS))}")
    return found
