"""Bytes and lines of plain, gzip and zstandard files, with one clear line for a damaged file."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from spikescale.errors import UserError

CHUNK = 1 << 20
GZIP_SUFFIXES = (".gz", ".dz")
COMPRESSED_SUFFIXES = (*GZIP_SUFFIXES, ".zst")


class Line(NamedTuple):
    """A line without its line end; `ordinal` counts from 0 at the first line that was read."""

    ordinal: int
    content: bytes


def is_compressed(path: Path) -> bool:
    """Whether the suffix says gzip or zstandard."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def read_chunks(path: Path) -> Iterator[bytes]:
    """The decompressed content in pieces. Raises UserError for a missing, damaged or truncated file."""
    suffix = path.suffix.lower()
    try:
        if suffix in GZIP_SUFFIXES:
            yield from _gzip_chunks(path)
        elif suffix == ".zst":
            yield from _zstd_chunks(path)
        else:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_all(path: Path) -> bytes:
    """The whole decompressed content."""
    return b"".join(read_chunks(path))


def read_lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Line]:
    """The lines whose first byte lies in [start, stop) of the decompressed content.

    A range that does not start at 0 needs an uncompressed file. Neighbouring ranges share no line
    and miss none.
    """
    ordinal, position, parts = 0, start, list[bytes]()
    skipping = start > 0
    # Reading begins one byte early: a line starts at `start` exactly when that byte is a line end.
    chunks = _chunks_from(path, start - 1) if skipping else read_chunks(path)
    if skipping:
        position = start - 1
    line_start = position
    for chunk in chunks:
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            if skipping:
                skipping = False
            else:
                parts.append(chunk[begin:end])
                yield Line(ordinal, b"".join(parts))
                ordinal += 1
            parts = []
            begin = end + 1
            line_start = position + begin
            if stop is not None and line_start >= stop:
                return
        if not skipping and begin < len(chunk):
            parts.append(chunk[begin:])
        position += len(chunk)
    if parts:
        yield Line(ordinal, b"".join(parts))


def line_number(path: Path, start: int, ordinal: int) -> int:
    """The number, from 1, of the line that `read_lines(path, start)` calls `ordinal`."""
    if start == 0:
        return ordinal + 1
    newlines, seen = 0, 0
    for chunk in read_chunks(path):
        if seen + len(chunk) >= start:
            head = chunk[: start - seen]
            return newlines + head.count(b"\n") + (0 if head.endswith(b"\n") else 1) + ordinal + 1
        newlines += chunk.count(b"\n")
        seen += len(chunk)
    return newlines + ordinal + 1


def _chunks_from(path: Path, start: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except EOFError:
        raise UserError(f"{path}: truncated: the gzip stream ends before its end marker") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or not gzip ({error})") from None


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    import zstandard

    # The library's stream reader ends silently where a truncated file ends, so frames are followed
    # one by one: a frame that was begun must be completed.
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    decompressor = None
    try:
        with path.open("rb") as file:
            pending = b""
            while chunk := pending or file.read(CHUNK):
                pending = b""
                if decompressor is None:
                    decompressor = context.decompressobj()
                if content := decompressor.decompress(chunk):
                    yield content
                if decompressor.eof:
                    pending, decompressor = decompressor.unused_data, None
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged or not zstandard ({error})") from None
    if decompressor is not None:
        raise UserError(f"{path}: truncated: the zstandard frame ends before its end marker")
