"""What a record holds, or why it holds no text: the same for every format."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spikescale.data_pipeline.sources.base import Document, ReadOptions
from spikescale.data_pipeline.sources.streams import DamagedInputError, FilePath

Metadata = tuple[tuple[str, str], ...]


class Fault(NamedTuple):
    """Why a record is none: its kind (see `base.bad_record`) and the reason in words."""

    kind: str
    reason: str


def joined_text(value: Any) -> str | None:
    """The text in a record's value: a string, a list of strings, or a list of messages with `content`.

    The parts of a list (turns of a conversation) are joined by a blank line. None for anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = [part.get("content") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "\n\n".join(texts)
    return None


def no_text(value: Any, key: str) -> str:
    """What is wrong with a value that holds no text."""
    kind = "null" if value is None else type(value).__name__
    return f"{key!r} must hold text (or a list of texts), not {kind}"


def found_metadata(record: Mapping[str, Any], keys: Sequence[str]) -> Metadata | Fault:
    """(key, value) for each of `keys` that the record has a value for, in the order of `keys`.

    Numbers become their decimal text; a value of another kind is a Fault.
    """
    pairs = []
    for key in keys:
        value = record.get(key)
        if value is None or value == "":
            continue
        if not isinstance(value, str | int):
            kind = type(value).__name__
            return Fault("schema", f"{key!r} must hold a text or a whole number, not {kind}")
        pairs.append((key, str(value)))
    return tuple(pairs)


def with_source(document: Document, keys: Sequence[str], name: str) -> Document:
    """The document with ("source", name) in its metadata if `keys` ask for it and it has none yet."""
    if "source" not in keys or any(key == "source" for key, _ in document.metadata):
        return document
    given = {**dict(document.metadata), "source": name}
    return document._replace(metadata=tuple((key, given[key]) for key in keys if key in given))


def row_text(record: Mapping[str, Any], options: ReadOptions) -> tuple[str, Metadata] | Fault:
    """Text and metadata of a row of named values, as `options` name them, or what is wrong with it."""
    if options.text_key not in record:
        return Fault("schema", f"no column {options.text_key!r}; there are {some_names(record)}")
    text = joined_text(record[options.text_key])
    if text is None:
        return Fault("schema", no_text(record[options.text_key], options.text_key))
    if is_too_long(text, options):
        return too_long(options)
    metadata = found_metadata(record, options.metadata_keys)
    return metadata if isinstance(metadata, Fault) else (text, metadata)


def lone_surrogate(text: str) -> int | None:
    """The first code point of a text that no encoding can hold, if there is one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return ord(text[error.start])
    return None


def is_too_long(text: str, options: ReadOptions) -> bool:
    """Whether a text is longer than a record may be."""
    limit = options.max_record_bytes
    return limit is not None and 4 * len(text) > limit and len(text.encode("utf-8", "replace")) > limit


def too_long(options: ReadOptions) -> Fault:
    """The Fault of a record that is longer than it may be."""
    assert options.max_record_bytes is not None
    return Fault("too-long", f"longer than {options.max_record_bytes / (1 << 20):g} MiB")


def damage(path: FilePath, error: DamagedInputError) -> Fault:
    """The Fault of a file whose rest cannot be read."""
    reason = str(error).removeprefix(f"{path}: ")
    return Fault("truncated" if reason.startswith("truncated") else "damaged", reason)


def some_names(names: Any) -> str:
    """The first few of some names, for messages."""
    listed = [repr(str(name)) for name in names]
    return ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "") or "none"


def one_line(error: BaseException) -> str:
    """The words of an error, without line ends."""
    return " ".join(str(error).split())
