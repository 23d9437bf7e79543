"""The optimizer's state in a checkpoint: fragments of flattened tensors, under the parameters' names.

    training/part-00001-of-00004.safetensors   tensors `<parameter>/<key>`, 1-D, key exp_avg or exp_avg_sq
    training/part-00001-of-00004.json          for each parameter in it: which range it is, of what shape
    training/random-rank-00001.safetensors     random generators of a rank

A fragment is the range [start, stop) of one parameter's value, flattened in row-major order. How ranks
shard the state shows only in where the ranges end, so whoever reads may shard it in another way: it asks
for the ranges that it owns and reads those bytes alone. A parameter that is divided over a tensor group
is stored as its local tensors, each fragment saying which one it belongs to. The weights are not
among the fragments: training keeps them in float32, so `model/` holds the very values.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spikescale.errors import UserError
from spikescale.files import read_json, write_json
from spikescale.model.store import WEIGHTS
from spikescale.tensor_file import DTYPES, FileRecord, LazyTensor, write_tensors
from spikescale.training.checkpoint_files import FORMAT, MODEL, STATE, TRAINING, Checkpoint


@dataclass(frozen=True)
class Shard:
    """Place of a local tensor in a whole one that is divided evenly along `dim`."""

    index: int
    size: int
    dim: int


@dataclass(frozen=True)
class Fragment:
    """A range of one parameter's optimizer state.

    shape is that of the local tensor, `shard` its place in the whole one (None: it is the whole one);
    step is Adam's count; tensors are 1-D with stop - start elements each.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard | None
    start: int
    stop: int
    step: float
    tensors: Mapping[str, Tensor | LazyTensor]


def part_name(rank: int, parts: int) -> str:
    """File name, without suffix, of what one rank wrote."""
    return f"part-{rank:05d}-of-{parts:05d}"


def write_part(
    folder: Path, fragments: Iterable[Fragment], save: str, rank: int, parts: int
) -> dict[str, FileRecord]:
    """Write one rank's part into the checkpoint `folder` and flush it; what was written, by relative path.

    save: a name that all parts of one save share and no other save has. Raises OSError.
    """
    described: dict[str, Any] = {}
    tensors: dict[str, Tensor | LazyTensor] = {}
    for fragment in fragments:
        shard = fragment.shard
        described[fragment.name] = {
            "start": fragment.start,
            "stop": fragment.stop,
            "shape": list(fragment.shape),
            "shard": shard and {"index": shard.index, "size": shard.size, "dim": shard.dim},
            "step": fragment.step,
            "keys": sorted(fragment.tensors),
        }
        tensors |= {f"{fragment.name}/{key}": tensor for key, tensor in fragment.tensors.items()}
    name = f"{TRAINING}/{part_name(rank, parts)}"
    record = write_tensors(folder / f"{name}.safetensors", tensors, {"save": save})
    content = {"format": FORMAT, "save": save, "rank": rank, "parts": parts, "fragments": described}
    write_json(folder / f"{name}.json", content)
    return {f"{name}.safetensors": record}


@dataclass(frozen=True)
class _Piece:
    """A fragment on the disk."""

    file: Path
    start: int
    stop: int
    shape: tuple[int, ...]
    shard: Shard | None
    step: float
    keys: tuple[str, ...]


class StoredState:
    """Reads any range of weights and optimizer state from a checkpoint, for any layout of ranks.

    Raises UserError, naming file or parameter, when parts are missing, belong to another save, overlap
    or leave gaps. Checksums are not compared here (see `verify_files`). Use it as a context manager.

    check: whether to open every part and hold it against its description, which one process of many may
    do for the others, who then open only what they read.
    """

    def __init__(self, checkpoint: Checkpoint, check: bool = True) -> None:
        self.folder, self._save = checkpoint.folder, str(checkpoint.state["save"])
        self._files: dict[Path, Any] = {}
        self._weights = self.folder / MODEL / WEIGHTS
        stored = self._open(self._weights)
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(stored.get_slice(name).get_shape()) for name in sorted(stored.keys())
        }
        self._pieces: dict[str, list[_Piece]] = {name: [] for name in self.shapes}
        for rank in range(int(checkpoint.state["parts"])):
            self._read_part(rank, int(checkpoint.state["parts"]), check)
        for name in self.shapes:
            self._require_cover(name)

    def __enter__(self) -> "StoredState":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def require_names(self, names: Iterable[str]) -> None:
        """Raise UserError unless the checkpoint holds exactly these parameters."""
        wanted = set(names)
        if missing := wanted - self.shapes.keys():
            raise UserError(f"{self.folder}: lacks the parameter {min(missing)} of this model")
        if others := self.shapes.keys() - wanted:
            raise UserError(f"{self.folder}: has a parameter {min(others)}, which this model has not")

    def keys(self, name: str) -> tuple[str, ...]:
        """Which tensors the optimizer keeps for a parameter."""
        return self._pieces[name][0].keys

    def step(self, name: str) -> float:
        """Adam's count of steps for a parameter."""
        return self._pieces[name][0].step

    def dtype(self, name: str, key: str) -> torch.dtype:
        """Type of an optimizer tensor as it is stored."""
        stored = self._open(self._pieces[name][0].file).get_slice(f"{name}/{key}")
        return next(dtype for dtype, stored_as in DTYPES.items() if stored_as == stored.get_dtype())

    def weights(
        self, name: str, shape: tuple[int, ...], shard: Shard | None, start: int, stop: int
    ) -> Tensor:
        """The range [start, stop) of a local weight of `shape`, flattened: float32, 1-D.

        Rows that only pad the whole tensor to an even division are 0.
        """
        row = math.prod(shape[1:])
        first, last = start // row, -(-stop // row)
        stored = self._open(self._weights).get_slice(name)
        whole = self.shapes[name]
        rows = (first, last)
        if shard is not None and shard.dim == 0:
            rows = (shard.index * shape[0] + first, shard.index * shape[0] + last)
        cut: tuple[slice, ...] = (slice(min(rows[0], whole[0]), min(rows[1], whole[0])),)
        for dim in range(1, len(whole)):
            offset = shard.index * shape[dim] if shard is not None and shard.dim == dim else 0
            cut += (slice(min(offset, whole[dim]), min(offset + shape[dim], whole[dim])),)
        wanted = (last - first, *shape[1:])
        if any(part.start >= part.stop for part in cut):
            return torch.zeros(stop - start)
        values = stored[cut]
        if tuple(values.shape) != wanted:
            padded = torch.zeros(wanted, dtype=values.dtype)
            padded[tuple(slice(0, length) for length in values.shape)] = values
            values = padded
        return values.reshape(-1)[start - first * row : stop - first * row]

    def moments(
        self, name: str, key: str, shape: tuple[int, ...], shard: Shard | None, start: int, stop: int
    ) -> Tensor:
        """The range [start, stop) of a local optimizer tensor of `shape`, flattened: 1-D."""
        source = self._pieces[name][0]
        if source.shard is None and shard is None:
            return self._read(name, key, 0, start, stop)
        ours, theirs = shard or Shard(0, 1, 0), source.shard or Shard(0, 1, 0)
        dim = ours.dim if shard is not None else theirs.dim
        if shard is not None and source.shard is not None and ours.dim != theirs.dim:
            raise UserError(f"{self.folder}: {name} is divided along another dimension than this model's")
        if ours.size == theirs.size and source.shape == shape:
            return self._read(name, key, ours.index, start, stop)
        if dim == 0:
            # Local tensors lie one after the other in the whole one, the padding at its end.
            base = ours.index * math.prod(shape)
            return self._read_whole(name, key, base + start, base + stop)
        local = math.prod(source.shape)
        parts = [self._read(name, key, i, 0, local).view(source.shape) for i in range(theirs.size)]
        whole = torch.cat(parts, dim)
        missing = max(0, (ours.index + 1) * shape[dim] - whole.shape[dim])
        if missing:
            pad = list(whole.shape)
            pad[dim] = missing
            whole = torch.cat([whole, whole.new_zeros(pad)], dim)
        return whole.narrow(dim, ours.index * shape[dim], shape[dim]).reshape(-1)[start:stop]

    def _read_whole(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """A range of the whole tensor of a parameter that is divided along its first dimension."""
        local = math.prod(self._pieces[name][0].shape)
        length = math.prod(self.shapes[name])  # beyond it there is padding, ours or theirs
        found = []
        while start < min(stop, length):
            index = start // local
            end = min(stop, length, (index + 1) * local)
            found.append(self._read(name, key, index, start - index * local, end - index * local))
            start = end
        if start < stop:
            found.append(torch.zeros(stop - start, dtype=self.dtype(name, key)))
        return torch.cat(found) if found else torch.empty(0, dtype=self.dtype(name, key))

    def _read(self, name: str, key: str, index: int, start: int, stop: int) -> Tensor:
        """A range of one stored local tensor, put together from the fragments that overlap it."""
        found = []
        for piece in self._pieces[name]:  # sorted by shard, then start
            if (piece.shard.index if piece.shard else 0) == index:
                first, last = max(start, piece.start), min(stop, piece.stop)
                if first < last:
                    stored = self._open(piece.file).get_slice(f"{name}/{key}")
                    found.append(stored[first - piece.start : last - piece.start])
        if not found:
            return torch.empty(0, dtype=self.dtype(name, key))
        return torch.cat(found) if len(found) > 1 else found[0]

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise UserError(f"{path}: missing from the checkpoint") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        return self._files[path]

    def _read_part(self, rank: int, parts: int, check: bool) -> None:
        described = self.folder / TRAINING / f"{part_name(rank, parts)}.json"
        content, tensors = read_json(described), described.with_suffix(".safetensors")
        if not isinstance(content, dict) or not isinstance(content.get("fragments"), dict):
            raise UserError(f"{described}: does not describe a part")
        if content.get("save") != self._save:
            raise UserError(f"{described}: belongs to another save than {self.folder / STATE}")
        if check and (self._open(tensors).metadata() or {}).get("save") != self._save:
            raise UserError(f"{tensors}: belongs to another save than {self.folder / STATE}")
        present = set(self._open(tensors).keys()) if check else set()
        for name, entry in content["fragments"].items():
            if name not in self._pieces:
                raise UserError(f"{described}: holds {name}, which is no parameter of the model")
            try:
                piece = _Piece(
                    tensors,
                    int(entry["start"]),
                    int(entry["stop"]),
                    tuple(entry["shape"]),
                    Shard(**entry["shard"]) if entry["shard"] else None,
                    float(entry["step"]),
                    tuple(entry["keys"]),
                )
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{described}: its entry for {name} is not a fragment's") from None
            for key in piece.keys if check else ():
                full = f"{name}/{key}"
                shape = self._open(tensors).get_slice(full).get_shape() if full in present else None
                if shape != [piece.stop - piece.start]:
                    raise UserError(
                        f"{tensors}: {full} is missing or has another length than {described.name} says"
                    )
            self._pieces[name].append(piece)

    def _require_cover(self, name: str) -> None:
        """Every element exactly once, and the same shape, division, keys and step everywhere."""
        pieces = self._pieces[name]
        if not pieces:
            raise UserError(f"{self.folder}: no part holds the optimizer's state of {name}")
        pieces.sort(key=lambda piece: (piece.shard.index if piece.shard else 0, piece.start))
        first = pieces[0]
        size = first.shard.size if first.shard else 1
        for piece in pieces:
            same = (piece.shape, piece.keys, piece.step) == (first.shape, first.keys, first.step)
            division = piece.shard and (piece.shard.size, piece.shard.dim)
            if not same or division != (first.shard and (first.shard.size, first.shard.dim)):
                raise UserError(f"{piece.file}: its {name} does not fit the one of {first.file.name}")
        whole = list(self.shapes[name])
        if first.shard:
            whole[first.shard.dim] = first.shape[first.shard.dim]
            if first.shape[first.shard.dim] * size < self.shapes[name][first.shard.dim]:
                raise UserError(
                    f"{first.file}: {name} has {size} parts of {first.shape}, too few for the model"
                )
        if tuple(whole) != first.shape:
            raise UserError(
                f"{first.file}: {name} has shape {first.shape}, the model's is {self.shapes[name]}"
            )
        for index in range(size):
            self._require_range(name, index, math.prod(first.shape))

    def _require_range(self, name: str, index: int, length: int) -> None:
        reached, before = 0, None
        for piece in self._pieces[name]:
            if (piece.shard.index if piece.shard else 0) == index and piece.start < piece.stop:
                if piece.start < reached and before is not None:
                    raise UserError(
                        f"{piece.file}: holds elements {piece.start} to {min(reached, piece.stop)} of {name},"
                        f" which {before.file.name} holds too"
                    )
                if piece.start > reached:
                    break
                reached, before = piece.stop, piece
        if reached != length:
            of = f" of tensor part {index}" if self._pieces[name][0].shard else ""
            raise UserError(
                f"{self.folder}: no part holds elements from {reached} on of {name}{of} ({length} elements)"
            )


def whole_fragments(stored: StoredState) -> Iterator[Fragment]:
    """The optimizer's state of every parameter as one fragment, each tensor read when it is written."""
    for name, shape in stored.shapes.items():
        length = math.prod(shape)
        tensors = {
            key: LazyTensor(
                stored.dtype(name, key),
                (length,),
                lambda name=name, key=key, shape=shape, length=length: stored.moments(  # type: ignore[misc]
                    name, key, shape, None, 0, length
                ),
            )
            for key in stored.keys(name)
        }
        yield Fragment(name, shape, None, 0, length, stored.step(name), tensors)
