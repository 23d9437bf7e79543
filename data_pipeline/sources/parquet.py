"""Documents out of parquet files, by row groups."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.sources.base import EXCERPT_BYTES, Document, ReadOptions, bad_record
from spikescale.data_pipeline.sources.records import (
    Fault,
    damage,
    one_line,
    row_text,
    some_names,
)
from spikescale.data_pipeline.sources.streams import DamagedInputError, FilePath, is_compressed, read_all
from spikescale.errors import UserError


def read_parquet(
    path: FilePath, options: ReadOptions, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """The text column of the row groups [start, stop) (all of them for None)."""
    import pyarrow

    try:
        file = open_parquet(path)
    except DamagedInputError as error:
        fault = damage(path, error)
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
                    found = record if isinstance(record, Fault) else row_text(record, options)
                    if not isinstance(found, Fault):
                        yield Document(found[0], where, found[1])
                        continue
                    value = "" if isinstance(record, Fault) else record[options.text_key]
                    shown = value if isinstance(value, str) else repr(value)
                    excerpt = shown[:EXCERPT_BYTES].encode("utf-8", "replace")
                    yield bad_record(options, where, found.kind, found.reason, excerpt, row=row)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        reason = f"damaged parquet ({one_line(error)})"
        facts = {"row": row + 1, "records": max(1, end - row)}
        yield bad_record(options, f"{path}, after row {row}", "damaged", reason, b"", **facts)


def _rows(batch: Any) -> Iterator[dict[str, Any] | Fault]:
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
            yield Fault("encoding", f"not valid utf-8 (byte 0x{byte:02x} at position {error.start})")


def _column_fault(schema: Any, key: str) -> Fault | None:
    import pyarrow

    if key not in schema.names:
        return Fault("schema", f"no column {key!r}; there are {some_names(schema.names)}")
    kind = schema.field(key).type
    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if any(check(inner) for check in (*texts, *lists)):
        return None
    return Fault("schema", f"column {key!r} must hold text (or lists of texts), not {kind}")


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
        raise DamagedInputError(f"{path}: not a whole parquet file ({one_line(error)})") from None
