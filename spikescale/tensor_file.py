"""Safetensors files written a block at a time, with their checksum.

The library's own writer copies everything into one buffer first and holds Python's lock while it
writes. A checkpoint is too large for the first, and is written beside training, which forbids the second.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 1 << 24  # bytes hashed and written at a time
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of what was written to a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written, and dropped afterwards."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write a safetensors file and flush it to the disk.

    Raises OSError when the disk cannot take it, and ValueError for a dtype that has no name here or a lazy
    tensor that turns out different from what it announced.
    """
    # Wide types first: every tensor then starts at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: {tensor.dtype} cannot be written")
        shape = tuple(tensor.shape)
        end = position + torch.Size(shape).numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    path.unlink(missing_ok=True)  # who has mapped a file of that name keeps its content
    with path.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            file.write(block)
        for name in order:
            raw = _raw_bytes(name, tensors[name])
            for start in range(0, len(raw), BLOCK):
                block_view = raw[start : start + BLOCK]
                digest.update(block_view)
                file.write(block_view)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(8 + len(text) + position, digest.hexdigest())


def _raw_bytes(name: str, source: Tensor | LazyTensor) -> memoryview:
    tensor = source.make() if isinstance(source, LazyTensor) else source
    if tensor.dtype != source.dtype or tuple(tensor.shape) != tuple(source.shape):
        raise ValueError(
            f"{name}: is {tensor.dtype} {tuple(tensor.shape)}, announced as {source.dtype} {source.shape}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
