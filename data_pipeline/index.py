"""The .idx file of megatron-core's IndexedDataset, written and read without megatron-core.

Importing megatron-core for these few lines takes 2 to 3 CPU seconds and 0.4 GiB in every process that
prepares data, and its writer a step of Python a document. What is written here is the same to the last byte.

The file is little-endian: magic (9 bytes), version 1 (u64), the code of the tokens' dtype (u8), how many
sequences (u64) and document boundaries (u64) there are; then the length of each sequence in tokens (i32),
the byte of the .bin file at which it begins (i64), and the boundaries, counted in sequences (i64). Here a
sequence is a document.
"""

import struct
from pathlib import Path

import numpy as np

from spikescale.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the index of documents back to back, of these lengths in tokens, their end included."""
    boundaries = np.arange(len(lengths) + 1, dtype="<i8")
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    begins = ends - lengths * dtype.itemsize
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], len(lengths), len(boundaries)))
        file.write(lengths.astype("<i4").tobytes())
        file.write(begins.astype("<i8").tobytes())
        file.write(boundaries.tobytes())


def read_index(path: Path) -> np.ndarray:
    """Tokens of each document, int64. Raises UserError for a file that is missing, damaged or another's."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if content[:9] != MAGIC or len(content) < HEADER.size:
        raise UserError(f"{path}: not an index of a megatron-core IndexedDataset")
    *_, sequences, boundaries = HEADER.unpack_from(content)
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if len(content) != expected:
        raise UserError(f"{path}: truncated: {len(content)} bytes, its header announces {expected}")
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size).astype(np.int64)
    documents = np.frombuffer(content, "<i8", boundaries, HEADER.size + 12 * sequences)
    return np.diff(np.concatenate([[0], np.cumsum(lengths)])[documents])
