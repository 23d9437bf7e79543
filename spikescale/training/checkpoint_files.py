"""The files of checkpoints, without their tensors: names, index, checksums. Needs no torch.

checkpoints/
    latest                name of the newest whole checkpoint
    best                  name of the one with the lowest validation loss
    step-00000200/
        model/            weights as safetensors, settings, tokenizer: all that `generate` needs
        training/         the optimizer's state and random generators, a part for each rank that wrote
        state.json        step, data position, metrics, layout
        index.json        size and SHA-256 of every file, written last
"""

import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikescale.errors import UserError
from spikescale.files import fsync_file, read_json, sha256_file, write_json

FORMAT = 2
INDEX = "index.json"
STATE = "state.json"
MODEL = "model"
TRAINING = "training"


class OtherFormatError(UserError):
    """A checkpoint that another version of this project wrote: not damaged, but not readable here."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.state["step"])

    @property
    def valid_loss(self) -> float | None:
        """Validation loss in nats a token, None when it was not measured."""
        loss = self.state["metrics"].get("valid_loss")
        return None if loss is None else float(loss)

    @property
    def layout(self) -> dict[str, Any] | None:
        """How the ranks that wrote it were laid out; None after a conversion, which belongs to none."""
        return self.state["layout"]


def checkpoint_names(folder: Path) -> list[str]:
    """Names of the published checkpoints in a folder `checkpoints`, oldest first."""
    return sorted(path.name for path in folder.glob("step-*") if path.is_dir())


def best_checkpoint(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest finite validation loss."""
    judged = [(c.valid_loss, c) for c in checkpoints if c.valid_loss is not None]
    finite = [(loss, c) for loss, c in judged if math.isfinite(loss)]
    return min(finite, key=lambda pair: pair[0])[1] if finite else None


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint's state, its files unread. Raises OtherFormatError, and UserError when it is damaged."""
    file = folder / STATE
    state = read_json(file)
    found = state.get("format") if isinstance(state, dict) else None
    if found == 1:
        raise OtherFormatError(
            f"{folder}: format 1, with optimizer state in DeepSpeed's own files; finish the run, or export"
            " its model, with the version that wrote it, or start under another name"
        )
    if found != FORMAT:
        raise OtherFormatError(f"{folder}: format {found!r}, and this version reads format {FORMAT}")
    for key, kind in (("step", int), ("save", str), ("parts", int), ("metrics", dict)):
        if not isinstance(state.get(key), kind):
            raise UserError(f"{file}: {key} is missing or not {kind.__name__}")
    if "layout" not in state:
        raise UserError(f"{file}: layout is missing")
    return Checkpoint(folder, state)


def write_index(folder: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write `index.json` with size and SHA-256 of every file below `folder`.

    known: entries {"bytes", "sha256"}, by path relative to `folder`, of files that their writers have
    flushed and summed; their sizes are compared, the other files are flushed and read.

    Raises UserError when a known file is missing or has another size.
    """
    known = known or {}
    index: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != INDEX:
            if name in known:
                index[name] = dict(known[name])
                _require_size(path, index[name]["bytes"])
            else:
                fsync_file(path)
                index[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    for name in sorted(known.keys() - index.keys()):
        raise UserError(f"{folder / name}: missing from the checkpoint")
    write_json(folder / INDEX, index)


def verify_files(folder: Path) -> None:
    """Raise UserError unless every file that the index names is there, whole and unchanged, and no other."""
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not all(isinstance(entry, dict) for entry in index.values()):
        raise UserError(f"{folder / INDEX}: is not an index of files")
    for name, entry in index.items():
        _require_size(folder / name, entry.get("bytes"))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in index and name != INDEX:
            raise UserError(f"{path}: is not in the checkpoint's index")
    paths = [folder / name for name in index]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing does not hold Python's lock
        for path, found in zip(paths, pool.map(sha256_file, paths), strict=True):
            if found != index[path.relative_to(folder).as_posix()].get("sha256"):
                raise UserError(f"{path}: its content is not what was written (checksum differs)")


def total_bytes(folder: Path) -> int:
    """Bytes of all files of a checkpoint, from its index."""
    return sum(int(entry["bytes"]) for entry in read_json(folder / INDEX).values())


def _require_size(path: Path, expected: Any) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing from the checkpoint")
    if path.stat().st_size != expected:
        raise UserError(f"{path}: has {path.stat().st_size} bytes, {expected} were written")
