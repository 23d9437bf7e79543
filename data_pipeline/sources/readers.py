"""Documents out of text, JSON-lines and parquet files.

A record that cannot be read raises a UserError, or, with `bad_records: quarantine`, becomes a document
with a `fault` and, as metadata, its kind, where it lies and how it begins.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from spikescale.data_pipeline.sources.base import EXCERPT_BYTES, Document, ReadOptions, bad_record
from spikescale.data_pipeline.sources.streams import (
    DamagedInputError,
    FilePath,
    Line,
    is_compressed,
    line_number,
    read_all,
    read_chunks,
    read_lines,
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

_ERRORS = {"refuse": "strict", "replace": "replace"}


Metadata = tuple[tuple[str, str], ...]


class _Fault(NamedTuple):
    kind: str
    reason: str


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
            if isinstance(found, _Fault):
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
    path: FilePath, options: ReadOptions, text: str, broken: bool, damage: _Fault | None
) -> Iterator[Document]:
    """The pieces of a text; where `damage` cut it short, the last one is not whole."""
    pieces = list(cut_places(text, options.split_on))
    rest = pieces.pop() if damage is not None and pieces else (len(text), len(text))

    def bad(begin: int, fault: _Fault, piece: str) -> Document:
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
            fault = _Fault("encoding", f"not valid {options.encoding} (byte 0x{byte:02x})")
        elif _too_long(piece, options):
            fault = _long(options)
        if fault is not None:
            yield bad(begin, fault, piece)
        else:
            yield Document(piece, f"{path}, piece {number + 1}" if number else f"{path}")
    if damage is not None:
        yield bad(rest[0], damage, text[rest[0] : rest[1]])


def _whole(path: FilePath, options: ReadOptions) -> tuple[bytes, _Fault | None]:
    """The content, or its beginning and why there is no more."""
    limit = options.max_record_bytes if options.split_on == "file" else None
    parts, size = list[bytes](), 0
    try:
        for chunk in read_chunks(path):
            size += len(chunk)
            parts.append(chunk)
            if limit is not None and size > limit:
                return b"".join(parts)[:EXCERPT_BYTES], _long(options)
    except DamagedInputError as error:
        if options.bad_records == "refuse":
            raise
        return b"".join(parts), _damage(path, error)
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
    for line, content in _records(path, options, start, stop):
        if isinstance(content, str) and not content.strip():
            continue
        found = _json_text(content, options) if isinstance(content, str) else content
        if isinstance(found, _Fault):
            yield _bad_line(path, options, start, line, found)
        else:
            yield Document(found[0], _place(path, start, line.ordinal), found[1])


def _json_text(text: str, options: ReadOptions) -> tuple[str, Metadata] | _Fault:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        return _Fault("json", f"not valid JSON ({error.msg}, column {error.colno})")
    except ValueError as error:  # a number of too many digits
        return _Fault("json", f"not valid JSON ({_one_line(error)})")
    except RecursionError:
        return _Fault("json", "JSON nested too deeply")
    if not isinstance(record, dict):
        return _Fault("schema", f"must be a JSON object, not {type(record).__name__}")
    if options.text_key not in record:
        return _Fault("schema", f"no key {options.text_key!r}; there are {_some(record)}")
    found = _joined(record[options.text_key])
    if found is None:
        return _Fault("schema", _no_text(record[options.text_key], options.text_key))
    # Refused later, in split.py; cleaning may come first there.
    if options.bad_records != "refuse" and (code := _surrogate(found)) is not None:
        return _Fault("surrogate", f"not valid Unicode (lone surrogate U+{code:04X})")
    metadata = _metadata(record, options.metadata_keys)
    return metadata if isinstance(metadata, _Fault) else (found, metadata)


def _records(
    path: FilePath, options: ReadOptions, start: int, stop: int | None
) -> Iterator[tuple[Line, str | _Fault]]:
    """Each line with its text, or with what is wrong; at last, it may be, the unreadable rest of the file."""
    limit = options.max_record_bytes
    last = Line(-1, b"", start, -1)
    try:
        for line in read_lines(path, start, stop, limit):
            last = line
            if limit is not None and line.size > limit:
                yield line, _long(options)
                continue
            try:
                yield line, line.content.decode(options.encoding, _ERRORS[options.invalid_bytes])
            except UnicodeDecodeError as error:
                byte = line.content[error.start]
                where = f"(byte 0x{byte:02x} at position {error.start})"
                yield line, _Fault("encoding", f"not valid {options.encoding} {where}")
    except DamagedInputError as error:
        if options.bad_records == "refuse":
            raise
        yield Line(last.ordinal + 1, b"", last.offset + last.size + 1, 0), _damage(path, error)


def _bad_line(path: FilePath, options: ReadOptions, start: int, line: Line, fault: _Fault) -> Document:
    place = _place(path, start, line.ordinal)
    if options.bad_records == "refuse":
        place = f"{path}, line {line_number(path, start, line.ordinal)}"
    facts = {"offset": line.offset, "line": line.ordinal + 1}
    if start:
        facts["counted_from"] = start
    return bad_record(options, place, fault.kind, fault.reason, line.content, **facts)


def read_parquet(
    path: FilePath, options: ReadOptions, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """The text column of the row groups [start, stop) (all of them for None)."""
    import pyarrow

    try:
        file = open_parquet(path)
    except DamagedInputError as error:
        fault = _damage(path, error)
        yield bad_record(options, path, fault.kind, fault.reason, b"", row=1)
        return
    groups = range(start, file.num_row_groups if stop is None else stop)
    sizes = [file.metadata.row_group(group).num_rows for group in range(groups.stop)]
    row, end = sum(sizes[:start]), sum(sizes)
    if unfit := _column_fault(file.schema_arrow, options.text_key):
        facts = {"row": row + 1, "records": max(1, end - row)}
        yield bad_record(options, path, unfit.kind, unfit.reason, b"", **facts)
        return
    keys = options.metadata_keys
    columns = [options.text_key, *(key for key in keys if key in file.schema_arrow.names)]
    try:
        for group in groups:
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                for record in _rows(batch):
                    row += 1
                    where = f"{path}, row {row}"
                    found = record if isinstance(record, _Fault) else _row_text(record, options)
                    if not isinstance(found, _Fault):
                        yield Document(found[0], where, found[1])
                        continue
                    value = "" if isinstance(record, _Fault) else record[options.text_key]
                    shown = value if isinstance(value, str) else repr(value)
                    excerpt = shown[:EXCERPT_BYTES].encode("utf-8", "replace")
                    yield bad_record(options, where, found.kind, found.reason, excerpt, row=row)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        reason = f"damaged parquet ({_one_line(error)})"
        facts = {"row": row + 1, "records": max(1, end - row)}
        yield bad_record(options, f"{path}, after row {row}", "damaged", reason, b"", **facts)


def _rows(batch: Any) -> Iterator[dict[str, Any] | _Fault]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for number in range(batch.num_rows):
        try:
            yield from batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            yield _Fault("encoding", f"not valid utf-8 (byte 0x{byte:02x} at position {error.start})")


def _row_text(record: dict[str, Any], options: ReadOptions) -> tuple[str, Metadata] | _Fault:
    text = _joined(record[options.text_key])
    if text is None:
        return _Fault("schema", _no_text(record[options.text_key], options.text_key))
    if _too_long(text, options):
        return _long(options)
    metadata = _metadata(record, options.metadata_keys)
    return metadata if isinstance(metadata, _Fault) else (text, metadata)


def _column_fault(schema: Any, key: str) -> _Fault | None:
    import pyarrow

    if key not in schema.names:
        return _Fault("schema", f"no column {key!r}; there are {_some(schema.names)}")
    kind = schema.field(key).type
    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if any(check(inner) for check in (*texts, *lists)):
        return None
    return _Fault("schema", f"column {key!r} must hold text (or lists of texts), not {kind}")


def open_parquet(path: FilePath) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises UserError when the file is missing, DamagedInputError when it is not (a whole) parquet.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        if is_compressed(path):
            return pyarrow.parquet.ParquetFile(io.BytesIO(read_all(path)))
        return pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else path.open("rb"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        raise DamagedInputError(f"{path}: not a whole parquet file ({_one_line(error)})") from None


def text_of(value: Any, key: str, place: Any) -> str:
    """The text in a record's value: a string, a list of strings, or a list of messages with `content`.

    The parts of a list (turns of a conversation) are joined by a blank line. `place()` names the
    record in the UserError that anything else raises.
    """
    text = _joined(value)
    if text is None:
        raise UserError(f"{place()}: {_no_text(value, key)}")
    return text


def _joined(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = [part.get("content") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "\n\n".join(texts)
    return None


def _no_text(value: Any, key: str) -> str:
    kind = "null" if value is None else type(value).__name__
    return f"{key!r} must hold text (or a list of texts), not {kind}"


def _metadata(record: Mapping[str, Any], keys: Sequence[str]) -> Metadata | _Fault:
    pairs = []
    for key in keys:
        value = record.get(key)
        if value is None or value == "":
            continue
        if not isinstance(value, str | int):
            kind = type(value).__name__
            return _Fault("schema", f"{key!r} must hold a text or a whole number, not {kind}")
        pairs.append((key, str(value)))
    return tuple(pairs)


def metadata_of(record: Mapping[str, Any], keys: Sequence[str], place: Any) -> Metadata:
    """(key, value) for each of `keys` that the record has a value for, in the order of `keys`.

    Numbers become their decimal text. `place()` names the record in the UserError that other kinds raise.
    """
    found = _metadata(record, keys)
    if isinstance(found, _Fault):
        raise UserError(f"{place()}: {found.reason}")
    return found


def with_source(document: Document, keys: Sequence[str], name: str) -> Document:
    """The document with ("source", name) in its metadata if `keys` ask for it and it has none yet."""
    if "source" not in keys or any(key == "source" for key, _ in document.metadata):
        return document
    given = {**dict(document.metadata), "source": name}
    return document._replace(metadata=tuple((key, given[key]) for key in keys if key in given))


def _surrogate(text: str) -> int | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return ord(text[error.start])
    return None


def _too_long(text: str, options: ReadOptions) -> bool:
    limit = options.max_record_bytes
    return limit is not None and 4 * len(text) > limit and len(text.encode("utf-8", "replace")) > limit


def _long(options: ReadOptions) -> _Fault:
    assert options.max_record_bytes is not None
    return _Fault("too-long", f"longer than {options.max_record_bytes / (1 << 20):g} MiB")


def _damage(path: FilePath, error: DamagedInputError) -> _Fault:
    reason = str(error).removeprefix(f"{path}: ")
    return _Fault("truncated" if reason.startswith("truncated") else "damaged", reason)


def _place(path: FilePath, start: int, ordinal: int) -> str:
    # The number of a line far from the start costs a pass over the file, which only an error is worth.
    return f"{path}, line {ordinal + 1}" + (f" counted from byte {start}" if start else "")


def _some(names: Any) -> str:
    listed = [repr(str(name)) for name in names]
    return ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "") or "none"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
