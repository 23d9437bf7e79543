"""Checkpoints that are whole or absent.

    checkpoints/
        latest                name of the newest whole checkpoint
        best                  name of the one with the lowest validation loss
        step-00000200/
            model/            weights as safetensors, settings, tokenizer: all that `generate` needs
            engine/           DeepSpeed's state: a part of the optimizer for each rank
            random-rank0.safetensors ...
            state.json        step, data position, metrics, layout
            index.json        size and SHA-256 of every file, written last

A checkpoint is written under a temporary name, indexed, flushed and renamed; then `latest` is
replaced. A kill or a full disk at any point leaves the older ones as they were.
"""

import contextlib
import errno
import logging
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spikescale.config import RunConfig
from spikescale.errors import UserError
from spikescale.files import (
    TEMPORARY_PREFIX,
    fsync_file,
    fsync_folder,
    read_json,
    sha256_file,
    sweep_temporaries,
    write_json,
    write_text,
)
from spikescale.model.store import save_model_folder
from spikescale.training.agreement import from_main
from spikescale.training.bootstrap import Process
from spikescale.training.engine import apply_optimizer_settings, full_weights

log = logging.getLogger(__name__)

FORMAT = 1
ENGINE_TAG = "engine"
BYTES_PER_PARAMETER = 20  # weights twice (model folder, engine), two Adam moments, float32 masters


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.state["step"])


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, process: Process) -> None:
        self.folder, self.process = folder, process
        if process.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(folder)

    def names(self) -> list[str]:
        """Names of the published checkpoints, oldest first."""
        return sorted(path.name for path in self.folder.glob("step-*") if path.is_dir())

    def newest_valid(self) -> Checkpoint | None:
        """The newest checkpoint with every file as it was written, the same on every rank.

        Rank 0 reads and decides; damaged ones are set aside under another name, and that is said.
        """
        name = from_main(self.process, self._newest_valid_name)
        return Checkpoint(self.folder / name, read_json(self.folder / name / "state.json")) if name else None

    def _newest_valid_name(self) -> str | None:
        for name in reversed(self.names()):
            try:
                verify_checkpoint(self.folder / name)
                return name
            except UserError as error:
                damaged = self.folder / f"damaged-{name}"
                shutil.rmtree(damaged, ignore_errors=True)
                (self.folder / name).rename(damaged)
                log.warning("checkpoint passed over and kept as %s: %s", damaged.name, error)
        return None

    def save(
        self, engine: Any, config: RunConfig, tokenizer: Any, state: dict[str, Any], metrics: dict[str, float]
    ) -> Path:
        """Write a checkpoint; every rank calls it at the same step. Returns its folder.

        state: step, data position and whatever else must come back on resume.
        metrics: what is known of the model; `valid_loss` (nats a token) decides which is the best.
        Raises UserError when the disk cannot take it; older checkpoints are untouched.
        """
        name = f"step-{state['step']:08d}"
        aside, final = self.folder / f"{TEMPORARY_PREFIX}{name}", self.folder / name
        from_main(self.process, lambda: self._make_room(engine, aside))
        with removed_on_failure(aside):
            engine.save_checkpoint(str(aside), tag=ENGINE_TAG, save_latest=False)
            save_file(random_state(), aside / f"random-rank{self.process.rank}.safetensors")
            weights = full_weights(engine, self.process)
            if self.process.is_main:
                info = {"step": state["step"], **metrics}
                save_model_folder(aside / "model", weights, config.model, tokenizer, info)
                layout = {"world_size": self.process.world_size, "zero_stage": config.zero.stage}
                write_json(
                    aside / "state.json", {"format": FORMAT, "layout": layout, "metrics": metrics, **state}
                )
            _barrier()
            if self.process.is_main:
                for script in aside.glob("*.py"):  # DeepSpeed puts programs beside its data
                    script.unlink()
                write_index(aside)
                if final.exists():  # the same step again after a resume with other settings
                    shutil.rmtree(final)
                aside.replace(final)
                fsync_folder(self.folder)
                write_text(self.folder / "latest", name + "\n")
                self.retire(config.train.keep_last)
        _barrier()
        return final

    def load(self, checkpoint: Checkpoint, engine: Any, config: RunConfig) -> None:
        """Put engine and random generators back as they were. Raises UserError for another layout."""
        layout = checkpoint.state["layout"]
        now = {"world_size": self.process.world_size, "zero_stage": config.zero.stage}
        if layout != now:
            raise UserError(
                f"{checkpoint.folder}: written by {layout['world_size']} ranks with ZeRO stage"
                f" {layout['zero_stage']}; this run has {now['world_size']} ranks and stage"
                f" {now['zero_stage']}, start it like that"
            )
        loaded, _ = engine.load_checkpoint(
            str(checkpoint.folder), tag=ENGINE_TAG, load_lr_scheduler_states=False, load_module_strict=True
        )
        if loaded is None:
            raise UserError(f"{checkpoint.folder}: DeepSpeed could not load it")
        apply_optimizer_settings(engine, config)
        set_random_state(load_file(checkpoint.folder / f"random-rank{self.process.rank}.safetensors"))

    def best(self) -> str | None:
        """Name of the checkpoint with the lowest validation loss."""
        losses = {}
        for name in self.names():
            loss = read_json(self.folder / name / "state.json")["metrics"].get("valid_loss")
            if loss is not None and math.isfinite(loss):
                losses[name] = loss
        return min(losses, key=lambda name: losses[name]) if losses else None

    def retire(self, keep_last: int) -> None:
        """Point `best` at the lowest validation loss; remove all but that one and the last `keep_last`."""
        names = self.names()
        best = self.best()
        if best is not None:
            write_text(self.folder / "best", best + "\n")
        for name in names[:-keep_last]:
            if name != best:
                # First out of sight in one step: a kill leaves no half-removed checkpoint.
                doomed = self.folder / f"{TEMPORARY_PREFIX}old-{name}"
                (self.folder / name).replace(doomed)
                shutil.rmtree(doomed)

    def _make_room(self, engine: Any, aside: Path) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        needed, free = parameters * BYTES_PER_PARAMETER, shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: a checkpoint needs about {needed / 1e6:.0f} MB and the disk has"
                f" {free / 1e6:.0f} MB free; make room and start again: the run resumes from its last"
                " checkpoint"
            )
        aside.mkdir(parents=True)


@contextlib.contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove `folder` when the block fails. What other ranks still write there is swept at the next start."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_index(folder: Path) -> None:
    """Flush every file below `folder` and write their sizes and checksums to `index.json`."""
    index = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fsync_file(path)
            index[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        else:
            fsync_folder(path)
    write_json(folder / "index.json", index)


def verify_checkpoint(folder: Path) -> None:
    """Raise UserError unless every file that the index names is there, whole and unchanged."""
    index = read_json(folder / "index.json")
    for name, entry in index.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, {entry['bytes']} were written")
        if sha256_file(path) != entry["sha256"]:
            raise UserError(f"{path}: its content is not what was written (checksum differs)")


def random_state() -> dict[str, torch.Tensor]:
    """The state of every random generator that training may draw from, as uint8 tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int, rank: int) -> None:
    """Seed the generators, differently on each rank so that dropout masks differ."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def write_failure(error: BaseException, folder: Path) -> UserError:
    """The line for a failed write: what failed, and what is still there to continue from."""
    names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    kept = f"the last checkpoint is {names[-1]}" if names else "there is no earlier checkpoint"
    reason = " ".join(str(error).split())[:160]
    return UserError(f"{folder}: writing failed ({reason}); {kept}")


def is_write_failure(error: BaseException) -> bool:
    """Whether an exception says that the disk could not take what was written."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    # torch and safetensors report a failed write as their own errors, with the system's words inside
    words = ("failed writing", "no space left", "file too large", "unexpected pos", "quota")
    return isinstance(error, (RuntimeError, SafetensorError)) and any(w in str(error).lower() for w in words)


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
