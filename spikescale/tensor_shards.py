"""Tensors in a folder: one safetensors file, or several and an index, laid out as the Hugging Face hub does.

model.safetensors                                       all tensors, or
model-00001-of-00003.safetensors, ...                   each tensor in one of them, and
model.safetensors.index.json                            {"metadata": ..., "weight_map": {tensor: file}}
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spikescale import files
from spikescale.errors import UserError
from spikescale.tensor_file import FileRecord, LazyTensor, write_tensors

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MiB` or `1000000`. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if (
        match is None
        or match[2].upper() not in _UNITS
        or not (size := int(float(match[1]) * _UNITS[match[2].upper()]))
    ):
        raise UserError(f"size {text!r}: write a number of bytes above 0, or such as 500MB, 5GB or 2GiB")
    return size


def index_name(file_name: str) -> str:
    """The name of the index of `file_name`'s shards."""
    return f"{file_name}.index.json"


def plan_shards(tensors: Mapping[str, Tensor | LazyTensor], most_bytes: int | None) -> list[list[str]]:
    """The tensors' names, in order, cut into groups of at most `most_bytes`; None: one group.

    A tensor that is larger by itself is a group of its own.
    """
    groups: list[list[str]] = [[]]
    room = math.inf if most_bytes is None else float(most_bytes)
    left = room
    for name, tensor in tensors.items():
        size = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        if size > left and groups[-1]:
            groups.append([])
            left = room
        groups[-1].append(name)
        left -= size
    return groups


def write_sharded(
    folder: Path,
    file_name: str,
    tensors: Mapping[str, Tensor | LazyTensor],
    most_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, FileRecord]:
    """Write `tensors` to `folder`/`file_name`, or to shards of at most `most_bytes` with an index.

    Returns what was written by file name, the index not among them. `folder` is the caller's to
    make whole: files are written in place.
    """
    groups = plan_shards(tensors, most_bytes)
    stem, suffix = file_name.rsplit(".", 1)
    names = [file_name]
    if len(groups) > 1:
        names = [f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}" for number in range(1, len(groups) + 1)]
    written = {}
    for name, group in zip(names, groups, strict=True):
        written[name] = write_tensors(folder / name, {key: tensors[key] for key in group}, metadata)
    if len(groups) > 1:
        size = sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in tensors.values())
        places = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        files.write_json(folder / index_name(file_name), index)
    return written


@dataclass
class StoredTensors:
    """Tensors that lie in safetensors files and are read one at a time, memory-mapped.

    Attributes:
        label: the file or index that errors name.
        files: the safetensors files.
    """

    label: Path
    files: list[Path]
    _places: dict[str, Any] = field(default_factory=dict)

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one."""
        return tuple(self._places[name].get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """One tensor, as it was stored."""
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor


def shard_files(index: Path) -> dict[str, str]:
    """The file of each tensor that an index names. Raises UserError for one that has none."""
    content = files.read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: weight_map is missing or empty; it should give the file of each tensor")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: weight_map puts {name} into {file!r}, which is no file name")
    return places


@contextlib.contextmanager
def open_stored(path: Path) -> Iterator[StoredTensors]:
    """The tensors of a safetensors file, or of all files that an index (`*.index.json`) names.

    Raises UserError for a file that is missing or damaged, and an index that does not tell the truth.
    """
    places = shard_files(path) if path.name.endswith(".index.json") else None
    names = [path] if places is None else [path.parent / name for name in sorted(set(places.values()))]
    stored = StoredTensors(path, names)
    with contextlib.ExitStack() as stack:
        for file in names:
            if not file.is_file():
                raise UserError(f"{file}: no such file")
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from None
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                if places is not None and places.get(name) != file.name:
                    raise UserError(f"{path}: does not say that {file.name} holds {name}")
                stored._places[name] = opened
        if places is not None and (missing := sorted(places.keys() - stored.names())):
            raise UserError(f"{path}: {missing[0]} is not in {places[missing[0]]}")
        try:
            yield stored
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
