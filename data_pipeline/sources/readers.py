"""Documents out of text, JSON-lines and parquet files."""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.sources.base import Document, ReadOptions
from spikescale.data_pipeline.sources.streams import is_compressed, line_number, read_all, read_lines
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


def format_of(path: Path) -> str | None:
    """text, jsonl or parquet by the suffix before .gz or .zst; None for any other suffix."""
    name = path.with_suffix("") if is_compressed(path) else path
    return FORMATS.get(name.suffix.lower())


def read_text(
    path: Path, options: ReadOptions, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """Documents of a text file, cut as `options.split_on` says. Empty pieces are left out."""
    if options.split_on == "line":
        for line in read_lines(path, start, stop):
            text = _decoded(line.content, options, path, start, line.ordinal)
            if text.strip():
                yield Document(text, _place(path, start, line.ordinal))
        return
    content = read_all(path)
    try:
        text = content.decode(options.encoding, _ERRORS[options.invalid_bytes])
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {number}: not valid {options.encoding} (byte 0x{content[error.start]:02x})"
        ) from None
    del content
    for number, piece in enumerate(cut_text(text, options.split_on)):
        yield Document(piece, f"{path}, piece {number + 1}" if number else f"{path}")


def cut_text(text: str, split_on: str) -> Iterator[str]:
    """The non-blank pieces of `text`: the whole (`file`), paragraphs (`blank-line`), or cut by a regex."""
    if split_on == "file":
        pieces: Iterator[str] = iter((text,))
    else:
        pieces = _cut_by_pattern(text, r"\n[ \t\r]*\n\s*" if split_on == "blank-line" else split_on)
    for piece in pieces:
        if piece.strip():
            yield piece


def _cut_by_pattern(text: str, pattern: str) -> Iterator[str]:
    try:
        matches = re.compile(pattern).finditer(text)
    except re.error as error:
        raise UserError(f"split_on: {pattern!r} is not a regular expression ({error})") from None
    begin = 0
    for match in matches:
        yield text[begin : match.start()]
        begin = match.end()
    yield text[begin:]


def read_jsonl(
    path: Path, options: ReadOptions, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """The text under `options.text_key` of each JSON line. Blank lines are left out."""

    for line in read_lines(path, start, stop):
        if not line.content.strip():
            continue

        def place(index: int = line.ordinal) -> str:
            return f"{path}, line {line_number(path, start, index)}"

        text = _decoded(line.content, options, path, start, line.ordinal)
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{place()}: not valid JSON ({error.msg}, column {error.colno})") from None
        except RecursionError:
            raise UserError(f"{place()}: JSON nested too deeply") from None
        if not isinstance(record, dict):
            raise UserError(f"{place()}: must be a JSON object, not {type(record).__name__}")
        if options.text_key not in record:
            raise UserError(f"{place()}: no key {options.text_key!r}; there are {_some(record)}")
        where = _place(path, start, line.ordinal)
        metadata = metadata_of(record, options.metadata_keys, place)
        yield Document(text_of(record[options.text_key], options.text_key, place), where, metadata)


def read_parquet(
    path: Path, options: ReadOptions, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """The text column of the row groups [start, stop) (all of them for None)."""
    import pyarrow

    file = open_parquet(path)
    names = file.schema_arrow.names
    if options.text_key not in names:
        raise UserError(f"{path}: no column {options.text_key!r}; there are {_some(names)}")
    columns = [options.text_key, *(key for key in options.metadata_keys if key in names)]
    groups = range(start, file.num_row_groups if stop is None else stop)
    row = sum(file.metadata.row_group(group).num_rows for group in range(start))
    try:
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=columns):
            for record in batch.to_pylist():
                row += 1
                where = f"{path}, row {row}"

                def place(where: str = where) -> str:
                    return where

                metadata = metadata_of(record, options.metadata_keys, place)
                yield Document(text_of(record[options.text_key], options.text_key, place), where, metadata)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, after row {row}: damaged parquet ({_one_line(error)})") from None


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises UserError when the file is missing or not parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(io.BytesIO(read_all(path)) if is_compressed(path) else path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file ({_one_line(error)})") from None


def text_of(value: Any, key: str, place: Any) -> str:
    """The text in a record's value: a string, a list of strings, or a list of messages with `content`.

    The parts of a list (turns of a conversation) are joined by a blank line. `place()` names the
    record in the UserError that anything else raises.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = [part.get("content") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "\n\n".join(texts)
    kind = "null" if value is None else type(value).__name__
    raise UserError(f"{place()}: {key!r} must hold text (or a list of texts), not {kind}")


def metadata_of(record: Mapping[str, Any], keys: Sequence[str], place: Any) -> tuple[tuple[str, str], ...]:
    """(key, value) for each of `keys` that the record has a value for, in the order of `keys`.

    Numbers become their decimal text. `place()` names the record in the UserError that other kinds raise.
    """
    pairs = []
    for key in keys:
        value = record.get(key)
        if value is None or value == "":
            continue
        if not isinstance(value, str | int):
            raise UserError(
                f"{place()}: {key!r} must hold a text or a whole number, not {type(value).__name__}"
            )
        pairs.append((key, str(value)))
    return tuple(pairs)


def with_source(document: Document, keys: Sequence[str], name: str) -> Document:
    """The document with ("source", name) in its metadata if `keys` ask for it and it has none yet."""
    if "source" not in keys or any(key == "source" for key, _ in document.metadata):
        return document
    given = {**dict(document.metadata), "source": name}
    return document._replace(metadata=tuple((key, given[key]) for key in keys if key in given))


def _place(path: Path, start: int, ordinal: int) -> str:
    # The number of a line far from the start costs a pass over the file, which only an error is worth.
    return f"{path}, line {ordinal + 1}" + (f" counted from byte {start}" if start else "")


def _decoded(content: bytes, options: ReadOptions, path: Path, start: int, index: int) -> str:
    try:
        return content.decode(options.encoding, _ERRORS[options.invalid_bytes])
    except UnicodeDecodeError as error:
        number = line_number(path, start, index)
        raise UserError(
            f"{path}, line {number}: not valid {options.encoding} (byte 0x{content[error.start]:02x} "
            f"at position {error.start})"
        ) from None


def _some(names: Any) -> str:
    listed = [repr(str(name)) for name in names]
    return ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "") or "none"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
