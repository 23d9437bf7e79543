"""Bytes and lines of plain, gzip and zstandard files, with one clear line for a damaged file."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spikescale.data_pipeline.sources.base import EXCERPT_BYTES
from spikescale.data_pipeline.storage import RemoteFile
from spikescale.errors import UserError

FilePath = Path | RemoteFile

CHUNK = 1 << 20
GZIP_SLICE = 1 << 10
ZSTD_SLICE = 256
GZIP_SUFFIXES = (".gz", ".dz")
COMPRESSED_SUFFIXES = (*GZIP_SUFFIXES, ".zst")


class DamagedInputError(UserError):
    """The rest of a file cannot be read, whoever tries: it is truncated or damaged."""


class Line(NamedTuple):
    """A line without its line end.

    Attributes:
        ordinal: counts from 0 at the first line that was read.
        content: its bytes; of a line longer than the reader's limit only the first EXCERPT_BYTES.
        offset: of its first byte in the (decompressed) file.
        size: its length in bytes.
    """

    ordinal: int
    content: bytes
    offset: int
    size: int


def is_compressed(path: FilePath) -> bool:
    """Whether the suffix says gzip or zstandard."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def read_chunks(path: FilePath) -> Iterator[bytes]:
    """The decompressed content in pieces of some MiB at most.

    Raises UserError for a file that is missing or cannot be opened, DamagedInputError for a damaged or
    truncated one, after everything that could be decompressed.
    """
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


def read_all(path: FilePath) -> bytes:
    """The whole decompressed content."""
    return b"".join(read_chunks(path))


class LineGroup(NamedTuple):
    """Lines that follow each other, without their line ends; they are never none.

    Attributes:
        ordinal: of the first line, counted from 0 at the first that was read.
        lines: their bytes; of a line longer than the reader's limit only the first EXCERPT_BYTES.
        offset: of the first line's first byte in the (decompressed) file.
        size: the length in bytes of a single line that was cut; None: all are whole.
    """

    ordinal: int
    lines: list[bytes]
    offset: int
    size: int | None = None

    def each(self) -> Iterator[Line]:
        """Each with all that is known of it."""
        offset = self.offset
        for ordinal, content in enumerate(self.lines, self.ordinal):
            size = len(content) if self.size is None else self.size
            yield Line(ordinal, content, offset, size)
            offset += size + 1


def read_lines(
    path: FilePath, start: int = 0, stop: int | None = None, longest: int | None = None
) -> Iterator[Line]:
    """The lines whose first byte lies in [start, stop) of the decompressed content.

    A range that does not start at 0 needs an uncompressed file. Neighbouring ranges share no line
    and miss none. Of a line of more than `longest` bytes only the beginning is held in memory.
    """
    for group in read_line_groups(path, start, stop, longest):
        yield from group.each()


def read_line_groups(
    path: FilePath, start: int = 0, stop: int | None = None, longest: int | None = None
) -> Iterator[LineGroup]:
    """As `read_lines`, many lines at once: those that end in one piece of the file."""
    ordinal, size, parts = 0, 0, list[bytes]()
    skipping = start > 0
    # Reading begins one byte early: a line starts at `start` exactly when that byte is a line end.
    position = start - 1 if skipping else start
    line_start = position
    for chunk in _chunks_from(path, position) if skipping else read_chunks(path):
        begin, end = 0, chunk.find(b"\n")
        if end >= 0 and (skipping or parts):
            # The line that an earlier piece began.
            if not skipping:
                size += end
                _append(parts, chunk[:end], size, longest)
                yield LineGroup(ordinal, [b"".join(parts)], line_start, size)
                ordinal += 1
            skipping, parts, size = False, [], 0
            begin = end + 1
            line_start = position + begin
            if stop is not None and line_start >= stop:
                return
        last = len(chunk) if stop is None else min(len(chunk), max(stop - position - 1, 0))
        # Of the lines that begin before `stop`, the last ends at the first line end from there on.
        end = chunk.rfind(b"\n", begin) if last == len(chunk) else chunk.find(b"\n", max(begin, last))
        if end < 0 and last < len(chunk):
            end = chunk.rfind(b"\n", begin)
        if end >= begin and not skipping:
            yield from _whole_lines(chunk[begin:end].split(b"\n"), ordinal, line_start, longest)
            ordinal += chunk.count(b"\n", begin, end) + 1
            begin = end + 1
            line_start = position + begin
            if stop is not None and line_start >= stop:
                return
        position += len(chunk)
        if skipping:
            if stop is not None and position >= stop:
                return  # one long line: none begins in this range
        elif begin < len(chunk):
            size += len(chunk) - begin
            _append(parts, chunk[begin:], size, longest)
    if parts:
        yield LineGroup(ordinal, [b"".join(parts)], line_start, size)


def _whole_lines(lines: list[bytes], ordinal: int, offset: int, longest: int | None) -> Iterator[LineGroup]:
    if longest is None or max(map(len, lines)) <= longest:
        yield LineGroup(ordinal, lines, offset)
        return
    for line in lines:
        content = line if len(line) <= longest else line[:EXCERPT_BYTES]
        yield LineGroup(ordinal, [content], offset, len(line))
        ordinal += 1
        offset += len(line) + 1


def _append(parts: list[bytes], piece: bytes, size: int, longest: int | None) -> None:
    parts.append(piece)
    if longest is not None and size > longest:
        parts[:] = [b"".join(parts)[:EXCERPT_BYTES]]


def line_number(path: FilePath, start: int, ordinal: int) -> int:
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


def _chunks_from(path: FilePath, start: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _slices(path: FilePath, length: int) -> Iterator[bytes]:
    # The bytes lost before a damaged place, and the most that one slice may expand to, are bounded by this.
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            for begin in range(0, len(chunk), length):
                yield chunk[begin : begin + length]


def _gzip_chunks(path: FilePath) -> Iterator[bytes]:
    # Not gzip.open: on a truncated file it loses up to a whole read of what could be decompressed.
    member: Any = None
    first = True
    try:
        for piece in _slices(path, GZIP_SLICE):
            while piece:
                if member is None:
                    piece = piece if first else piece.lstrip(b"\0")  # padding between members is allowed
                    if not piece:
                        break
                    member, first = zlib.decompressobj(wbits=31), False
                content = member.decompress(piece, CHUNK)
                if content:
                    yield content
                piece = member.unconsumed_tail
                while len(content) == CHUNK and not piece and not member.eof:
                    # What zlib holds back when the output limit is reached with all input taken.
                    content = member.decompress(b"", CHUNK)
                    yield content
                if member.eof:
                    piece, member = member.unused_data, None
    except zlib.error as error:
        raise DamagedInputError(f"{path}: damaged or not gzip ({error})") from None
    if member is not None:
        raise DamagedInputError(f"{path}: truncated: the gzip stream ends before its end marker")


def _zstd_chunks(path: FilePath) -> Iterator[bytes]:
    import zstandard

    # The library's stream reader ends silently where a truncated file ends, so frames are followed
    # one by one: a frame that was begun must be completed.
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame: Any = None
    try:
        for piece in _slices(path, ZSTD_SLICE):
            while piece:
                if frame is None:
                    frame = context.decompressobj()
                if content := frame.decompress(piece):
                    yield content
                piece = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise DamagedInputError(f"{path}: damaged or not zstandard ({error})") from None
    if frame is not None:
        raise DamagedInputError(f"{path}: truncated: the zstandard frame ends before its end marker")
