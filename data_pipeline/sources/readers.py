"""Documents out of text and JSON-lines files.

A record that cannot be read raises a UserError, or, with `bad_records: quarantine`, becomes a document
with a `fault` and, as metadata, its kind, where it lies and how it begins.
"""

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import orjson

from spikescale.data_pipeline.sources.base import EXCERPT_BYTES, Document, ReadOptions, bad_record
from spikescale.data_pipeline.sources.records import (
    Fault,
    Metadata,
    damage,
    found_metadata,
    is_too_long,
    joined_text,
    lone_surrogate,
    no_text,
    one_line,
    some_names,
    too_long,
)
from spikescale.data_pipeline.sources.streams import (
    DamagedInputError,
    FilePath,
    Line,
    LineGroup,
    is_compressed,
    line_number,
    read_chunks,
    read_line_groups,
)
from spikescale.errors import UserError

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}

_decode_json = json.JSONDecoder().decode  # what json.loads does, without looking at its options each time
_new = tuple.__new__
_ERRORS = {"refuse": "strict", "replace": "replace"}


def format_of(path: Any) -> str | None:
    """text, jsonl or parquet by the suffix before .gz or .zst; None for any other suffix."""
    name = PurePosixPath(path.name)
    return FORMATS.get((name.with_suffix("") if is_compressed(path) else name).suffix.lower())


def read_text(
    path: FilePath, options: ReadOptions, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """Documents of a text file, cut as `options.split_on` says. Empty pieces are left out."""
    if options.split_on == "line":
        for line, found in _records(path, options, start, stop):
            if isinstance(found, Fault):
                yield _bad_line(path, options, start, line, found)
            elif found.strip():
                yield Document(found, _place(path, start, line.ordinal))
        return
    content, fault = _whole(path, options)
    if fault is not None and (options.split_on == "file" or fault.kind == "too-long"):
        yield bad_record(options, path, fault.kind, fault.reason, content, offset=0)
        return
    try:
        text, broken = content.decode(options.encoding, _ERRORS[options.invalid_bytes]), False
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        reason = f"not valid {options.encoding} (byte 0x{content[error.start]:02x})"
        whole = bad_record(
            options, f"{path}, line {number}", "encoding", reason, content, offset=0, line=number
        )
        try:
            text, broken = content.decode(options.encoding, "surrogateescape"), True
        except UnicodeDecodeError:
            broken = False
        if options.split_on == "file" or not broken:
            yield whole
            return
    del content
    yield from _pieces(path, options, text, broken, fault)


def _pieces(
    path: FilePath, options: ReadOptions, text: str, broken: bool, damage: Fault | None
) -> Iterator[Document]:
    """The pieces of a text; where `damage` cut it short, the last one is not whole."""
    pieces = list(cut_places(text, options.split_on))
    rest = pieces.pop() if damage is not None and pieces else (len(text), len(text))

    def bad(begin: int, fault: Fault, piece: str) -> Document:
        before = text[:begin].encode(options.encoding, "surrogateescape")
        excerpt = piece[:EXCERPT_BYTES].encode(options.encoding, "surrogateescape")
        line = text.count("\n", 0, begin) + 1
        where = f"{path}, line {line}"
        return bad_record(options, where, fault.kind, fault.reason, excerpt, offset=len(before), line=line)

    for number, (begin, end) in enumerate(pieces):
        piece = text[begin:end]
        fault = None
        if broken and (escaped := re.search("[\udc80-\udcff]", piece)):
            byte = ord(escaped[0]) - 0xDC00
            fault = Fault("encoding", f"not valid {options.encoding} (byte 0x{byte:02x})")
        elif is_too_long(piece, options):
            fault = too_long(options)
        if fault is not None:
            yield bad(begin, fault, piece)
        else:
            yield Document(piece, f"{path}, piece {number + 1}" if number else f"{path}")
    if damage is not None:
        yield bad(rest[0], damage, text[rest[0] : rest[1]])


def _whole(path: FilePath, options: ReadOptions) -> tuple[bytes, Fault | None]:
    """The content, or its beginning and why there is no more."""
    limit = options.max_record_bytes if options.split_on == "file" else None
    parts, size = list[bytes](), 0
    try:
        for chunk in read_chunks(path):
            size += len(chunk)
            parts.append(chunk)
            if limit is not None and size > limit:
                return b"".join(parts)[:EXCERPT_BYTES], too_long(options)
    except DamagedInputError as error:
        if options.bad_records == "refuse":
            raise
        return b"".join(parts), damage(path, error)
    return b"".join(parts), None


def cut_text(text: str, split_on: str) -> Iterator[str]:
    """The non-blank pieces of `text`: the whole (`file`), paragraphs (`blank-line`), or cut by a regex."""
    for begin, end in cut_places(text, split_on):
        yield text[begin:end]


def cut_places(text: str, split_on: str) -> Iterator[tuple[int, int]]:
    """Where the pieces of `cut_text` begin and end."""
    places: Iterator[tuple[int, int]] = iter(((0, len(text)),))
    if split_on != "file":
        places = _cut_by_pattern(text, r"\n[ \t\r]*\n\s*" if split_on == "blank-line" else split_on)
    for begin, end in places:
        if text[begin:end].strip():
            yield begin, end


def _cut_by_pattern(text: str, pattern: str) -> Iterator[tuple[int, int]]:
    try:
        matches = re.compile(pattern).finditer(text)
    except re.error as error:
        raise UserError(f"split_on: {pattern!r} is not a regular expression ({error})") from None
    begin = 0
    for match in matches:
        yield begin, match.start()
        begin = match.end()
    yield begin, len(text)


def read_jsonl(
    path: FilePath, options: ReadOptions, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """The text under `options.text_key` of each JSON line. Blank lines are left out."""
    plain = not options.metadata_keys and options.encoding.lower() in ("utf-8", "utf8")
    before, after = _around_ordinal(path, start)
    for group in _groups(path, options, start, stop):
        if not plain or not isinstance(group, LineGroup) or group.size is not None:
            yield from _json_documents(path, options, start, _decoded(group, options))
            continue
        # For speed alone: orjson takes less than json, and of what it takes it makes the same. A line that is
        # not simply an object with a text goes the other way.
        texts, first = _plain_texts(group.lines, options.text_key), group.ordinal + 1
        rest = [] if None not in texts else list(group.each())
        for number, text in enumerate(texts, first):
            if text is not None:
                # As Document(...), whose constructor in Python takes as long as reading a short line.
                yield _new(Document, (text, f"{before}{number}{after}", (), ""))
            else:
                line = rest[number - first]
                single = LineGroup(line.ordinal, [line.content], line.offset)
                yield from _json_documents(path, options, start, _decoded(single, options))


def _plain_texts(lines: list[bytes], key: str) -> list[str | None]:
    """The text of each line; None where a line is not simply an object that has one."""
    try:
        texts = [orjson.loads(line)[key] for line in lines]
    except (orjson.JSONDecodeError, TypeError, KeyError):
        # Which of them it is: alone, each is told apart from the others.
        return [None] if len(lines) == 1 else [text for line in lines for text in _plain_texts([line], key)]
    return texts if set(map(type, texts)) <= {str} else [t if type(t) is str else None for t in texts]


def _json_documents(
    path: FilePath, options: ReadOptions, start: int, lines: Iterator[tuple[Line, str | Fault]]
) -> Iterator[Document]:
    for line, content in lines:
        if isinstance(content, str) and not content.strip():
            continue
        found = _json_text(content, options) if isinstance(content, str) else content
        if isinstance(found, Fault):
            yield _bad_line(path, options, start, line, found)
        else:
            yield Document(found[0], _place(path, start, line.ordinal), found[1])


def _json_text(text: str, options: ReadOptions) -> tuple[str, Metadata] | Fault:
    try:
        record = _decode_json(text)
    except json.JSONDecodeError as error:
        return Fault("json", f"not valid JSON ({error.msg}, column {error.colno})")
    except ValueError as error:  # a number of too many digits
        return Fault("json", f"not valid JSON ({one_line(error)})")
    except RecursionError:
        return Fault("json", "JSON nested too deeply")
    if not isinstance(record, dict):
        return Fault("schema", f"must be a JSON object, not {type(record).__name__}")
    if options.text_key not in record:
        return Fault("schema", f"no key {options.text_key!r}; there are {some_names(record)}")
    found = joined_text(record[options.text_key])
    if found is None:
        return Fault("schema", no_text(record[options.text_key], options.text_key))
    # Refused later, in split.py; cleaning may come first there.
    if options.bad_records != "refuse" and (code := lone_surrogate(found)) is not None:
        return Fault("surrogate", f"not valid Unicode (lone surrogate U+{code:04X})")
    metadata = found_metadata(record, options.metadata_keys)
    return metadata if isinstance(metadata, Fault) else (found, metadata)


def _records(
    path: FilePath, options: ReadOptions, start: int, stop: int | None
) -> Iterator[tuple[Line, str | Fault]]:
    """Each line with its text, or with what is wrong; at last, it may be, the unreadable rest of the file."""
    for group in _groups(path, options, start, stop):
        yield from _decoded(group, options)


def _groups(
    path: FilePath, options: ReadOptions, start: int, stop: int | None
) -> Iterator[LineGroup | tuple[Line, Fault]]:
    """The lines, and at last, it may be, the unreadable rest of the file."""
    last = Line(-1, b"", start, -1)
    group: LineGroup | None = None
    try:
        for group in read_line_groups(path, start, stop, options.max_record_bytes):
            yield group
    except DamagedInputError as error:
        if options.bad_records == "refuse":
            raise
        if group is not None:
            *_, last = group.each()
        yield Line(last.ordinal + 1, b"", last.offset + last.size + 1, 0), damage(path, error)


def _decoded(
    group: LineGroup | tuple[Line, Fault], options: ReadOptions
) -> Iterator[tuple[Line, str | Fault]]:
    if not isinstance(group, LineGroup):
        yield group
        return
    limit = options.max_record_bytes
    for line in group.each():
        if limit is not None and line.size > limit:
            yield line, too_long(options)
            continue
        try:
            yield line, line.content.decode(options.encoding, _ERRORS[options.invalid_bytes])
        except UnicodeDecodeError as error:
            byte = line.content[error.start]
            where = f"(byte 0x{byte:02x} at position {error.start})"
            yield line, Fault("encoding", f"not valid {options.encoding} {where}")


def _bad_line(path: FilePath, options: ReadOptions, start: int, line: Line, fault: Fault) -> Document:
    place = _place(path, start, line.ordinal)
    if options.bad_records == "refuse":
        place = f"{path}, line {line_number(path, start, line.ordinal)}"
    facts = {"offset": line.offset, "line": line.ordinal + 1}
    if start:
        facts["counted_from"] = start
    return bad_record(options, place, fault.kind, fault.reason, line.content, **facts)


def _place(path: FilePath, start: int, ordinal: int) -> str:
    before, after = _around_ordinal(path, start)
    return f"{before}{ordinal + 1}{after}"


def _around_ordinal(path: FilePath, start: int) -> tuple[str, str]:
    # The number of a line far from the start costs a pass over the file, which only an error is worth.
    return f"{path}, line ", f" counted from byte {start}" if start else ""
