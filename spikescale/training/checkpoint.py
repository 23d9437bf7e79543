"""Checkpoints that are whole or absent, and that any number of ranks can continue from.

`checkpoint_files` has the layout on the disk and `fragments` that of the optimizer's state, `optimizer_state`
knows where DeepSpeed keeps it, `saving` writes beside training. Here they become one: a checkpoint is
written under a temporary name by all ranks, indexed, flushed and renamed; then `latest` is replaced. A
kill or a full disk at any point leaves the older ones as they were.
"""

import contextlib
import errno
import functools
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from spikescale.config import RunConfig
from spikescale.errors import UserError
from spikescale.files import (
    TEMPORARY_PREFIX,
    fsync_folder,
    read_json,
    sweep_temporaries,
    write_json,
    write_text,
)
from spikescale.model.store import SETTINGS, WEIGHTS, save_model_folder
from spikescale.parallel import Layout
from spikescale.tensor_file import FileRecord, write_tensors
from spikescale.training.agreement import agreed, from_main
from spikescale.training.bootstrap import Process
from spikescale.training.checkpoint_files import (
    FORMAT,
    MODEL,
    STATE,
    TRAINING,
    Checkpoint,
    OtherFormatError,
    best_checkpoint,
    checkpoint_names,
    read_checkpoint,
    verify_files,
    write_index,
)
from spikescale.training.engine import apply_optimizer_settings, full_weights
from spikescale.training.fragments import Fragment, StoredState, write_part
from spikescale.training.optimizer_state import (
    parameter_count,
    read_counters,
    read_fragments,
    write_counters,
    write_state,
)
from spikescale.training.randomness import random_state, seed_everything, set_random_state
from spikescale.training.saving import AbandonedError, Saving

__all__ = [
    "Checkpoint",
    "CheckpointFolder",
    "is_write_failure",
    "seed_everything",
    "verify_checkpoint",
    "write_failure",
]

log = logging.getLogger(__name__)

BYTES_PER_PARAMETER = 12  # weight and two moments, float32
SPARE_BYTES = 16 << 20  # for all that does not grow with the model
CLOSE_SECONDS = 120.0  # that a run which ends in an error waits for the ranks of a save in flight


class CheckpointFolder:
    """The checkpoints of one run.

    layout: this rank's place; None: all ranks share the data. tensor_group: the process group of the tensor
    group, None when there is none. `say` receives lines for people, from the main thread.
    """

    def __init__(
        self, folder: Path, process: Process, layout: Layout | None = None, tensor_group: Any = None
    ) -> None:
        self.folder, self.process = folder, process
        self.layout = layout or Layout(process.rank, process.world_size)
        self.say: Callable[[str], None] = log.info
        self._tensor_group = tensor_group
        self._saving: Saving | None = None
        self._name = ""
        if process.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(folder)

    def names(self) -> list[str]:
        """Names of the published checkpoints, oldest first."""
        return checkpoint_names(self.folder)

    def best(self) -> str | None:
        """Name of the checkpoint with the lowest validation loss."""
        readable = []
        for name in self.names():
            with contextlib.suppress(
                UserError
            ):  # a damaged one is no reason to end a run that does not need it
                readable.append(read_checkpoint(self.folder / name))
        found = best_checkpoint(readable)
        return found.folder.name if found else None

    def newest_valid(self, at_most: int | None = None) -> Checkpoint | None:
        """The newest checkpoint (of at most that step) with every file as it was written, on every rank.

        Rank 0 reads and decides; damaged ones are set aside under another name, and that is said. A save in
        flight is finished first. Raises UserError on every rank for one that another version wrote.
        """
        self.finish()
        name = from_main(self.process, lambda: self._newest_valid_name(at_most))
        return agreed(self.process, lambda: read_checkpoint(self.folder / name)) if name else None

    def of_another_run(self, folder: Path) -> Checkpoint:
        """The checkpoint `folder`, verified by rank 0, on every rank. Raises UserError on every rank."""
        agreed(self.process, lambda: verify_checkpoint(folder) if self.process.is_main else None)
        return agreed(self.process, lambda: read_checkpoint(folder))

    def _newest_valid_name(self, at_most: int | None) -> str | None:
        for name in reversed(self.names()):
            try:
                checkpoint = read_checkpoint(self.folder / name)
                if at_most is not None and checkpoint.step > at_most:
                    continue
                verify_checkpoint(self.folder / name)
                return name
            except OtherFormatError:
                raise
            except UserError as error:
                damaged = self.folder / f"damaged-{name}"
                shutil.rmtree(damaged, ignore_errors=True)
                (self.folder / name).rename(damaged)
                log.warning("checkpoint passed over and kept as %s: %s", damaged.name, error)
        return None

    def save(
        self, engine: Any, config: RunConfig, tokenizer: Any, state: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        """Write a checkpoint; every rank calls it at the same step.

        With `config.train.save_async` it returns when the state is copied to host memory; `poll` and `finish`
        tell how the writing went. A save still in flight is finished first.

        state: step, data position and whatever else must come back on resume.
        metrics: what is known of the model; `valid_loss` (nats a token) decides which is the best.
        Raises AgreedError when the disk cannot take it; older checkpoints are untouched.
        """
        began = time.perf_counter()
        if self._saving and self._saving.running and not self._saving.told:
            self.say(f"waiting for {self._name}, which is still being written")
        self.finish()
        name = f"step-{state['step']:08d}"
        aside = self.folder / f"{TEMPORARY_PREFIX}{name}"
        count = parameter_count(engine, self.layout)
        save = from_main(self.process, lambda: self._make_room(count, aside))
        with self._removed_on_failure(aside):
            fragments = read_fragments(engine, self.layout)
            weights = full_weights(engine, self.process, self._tensor_group)
            random = random_state()
        ranks = self.layout.world_size
        content = {
            **state,
            "format": FORMAT,
            "save": save,
            "parts": ranks,
            "layout": {
                "ranks": ranks,
                "tensor": self.layout.tensor,
                "context": self.layout.context,
                "zero_stage": config.zero.stage,
            },
            "engine": read_counters(engine),
            "metrics": metrics,
        }

        write = functools.partial(self._write, aside, content, fragments, random)
        if self.process.is_main:
            info = {"step": state["step"], **metrics}
            write.keywords["model"] = functools.partial(
                save_model_folder, aside / MODEL, weights, config.model, tokenizer, info
            )
        keep = {f"step-{step:08d}" for step in config.train.save_at}
        publish = functools.partial(self._publish, name, aside, keep_last=config.train.keep_last, keep=keep)
        self._saving, self._name = Saving(self.process, aside, write, publish), name
        if config.train.save_async:
            self._saving.stall_seconds = time.perf_counter() - began
            self.say(f"saving {name} in the background (copied in {self._saving.stall_seconds:.2f} s)")
        else:
            self.finish(began)

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in flight failed. Local and cheap."""
        return self._saving is not None and self._saving.error is not None

    def poll(self) -> None:
        """Say what was published meanwhile. Local and cheap: for every step.

        Raises UserError, on this rank alone, when the background write failed here (rank 0: anywhere).
        """
        saving = self._saving
        if saving is None or saving.running or saving.told:
            return
        if saving.error is not None:
            raise self._failure(saving.error)
        self._tell(saving)

    def finish(self, began: float | None = None) -> None:
        """Wait until the save in flight, if there is one, is published; every rank calls it.

        began: when training stopped for it (perf_counter), None when it went on meanwhile. Raises AgreedError
        on every rank when a rank could not write or rank 0 not publish; then nothing was published.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        write_error = saving.wait_written()
        try:
            agreed(self.process, lambda: self._raise_failure(write_error))
            error = saving.wait_published()
            agreed(self.process, lambda: self._raise_failure(error))
        except BaseException:
            saving.abandon()
            if self.process.is_main:
                shutil.rmtree(saving.aside, ignore_errors=True)
            raise
        if began is not None:
            saving.stall_seconds = time.perf_counter() - began
        if not saving.told:
            self._tell(saving)

    def close(self) -> None:
        """Let a save in flight end while the run ends in an error. Local, and raises nothing of its own."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        error = saving.wait_published(CLOSE_SECONDS)
        if saving.running:
            saving.abandon()
            error = UserError("not all ranks wrote their parts")
        if error is None and not saving.told:
            self._tell(saving)
        elif error is not None:
            log.warning("%s was not published: %s", self._name, error)
            if self.process.is_main:
                shutil.rmtree(saving.aside, ignore_errors=True)

    def load(self, checkpoint: Checkpoint, engine: Any, config: RunConfig) -> str | None:
        """Put engine and random generators back as they were; every rank calls it, also amid a run.

        Any layout of ranks, ZeRO stage and offload can load what any other has written; gradients are
        dropped. The random generators come back where the ranks are laid out as they were, else they are
        seeded anew, and the returned sentence says so. Raises AgreedError when the checkpoint does not fit.
        """
        stored = agreed(self.process, lambda: self._open(checkpoint, engine))
        with stored:
            write_state(engine, self.layout, stored)
        write_counters(engine, checkpoint.state["engine"])
        apply_optimizer_settings(engine, config)
        layout = checkpoint.layout
        now = {"ranks": self.layout.world_size, "tensor": self.layout.tensor, "context": self.layout.context}
        if layout is not None and all(layout[key] == value for key, value in now.items()):
            set_random_state(load_file(checkpoint.folder / random_file(self.layout.rank)))
            return None
        index = self.layout.rank // self.layout.tensor  # a tensor group draws alike
        seed_everything(config.train.seed, index, checkpoint.step)
        then = "a converted checkpoint" if layout is None else f"{layout['ranks']} rank(s)"
        return (
            f"{checkpoint.folder.name} is from {then} in another layout: random generators are seeded anew,"
            " everything else continues exactly"
        )

    def retire(self, keep_last: int, keep: Collection[str] = ()) -> None:
        """Point `best` at the lowest loss; remove all checkpoints but it, `keep` and the last `keep_last`."""
        names = self.names()
        best = self.best()
        if best is not None:
            write_text(self.folder / "best", best + "\n")
        for name in names[:-keep_last]:
            if name != best and name not in keep:
                self._remove(name)

    def _remove(self, name: str) -> None:
        # First out of sight in one step: a kill leaves no half-removed checkpoint.
        doomed = self.folder / f"{TEMPORARY_PREFIX}old-{name}"
        (self.folder / name).replace(doomed)
        shutil.rmtree(doomed)

    def _write(
        self,
        aside: Path,
        content: dict[str, Any],
        fragments: list[Fragment],
        random: dict[str, torch.Tensor],
        model: Callable[[], None] | None = None,
    ) -> dict[str, FileRecord]:
        """Write this rank's files, with `model` and the state on rank 0; in the writing thread."""
        rank = self.layout.rank
        records = write_part(aside, fragments, content["save"], rank, content["parts"])
        records[random_file(rank)] = write_tensors(aside / random_file(rank), random)
        if model is not None:
            model()
            records |= weights_record(aside)
            write_json(aside / STATE, content)
        return records

    def _publish(
        self, name: str, aside: Path, files: dict[str, Any], keep_last: int, keep: Collection[str]
    ) -> None:
        """Make a checkpoint of what all ranks wrote; on rank 0, possibly in the writing thread."""
        for folder in (aside, aside / TRAINING):
            fsync_folder(folder)
        write_index(aside, known=files)
        final = self.folder / name
        if final.exists():  # the same step again, after a roll-back or a resume with other settings
            self._remove(name)
        aside.replace(final)
        fsync_folder(self.folder)
        write_text(self.folder / "latest", name + "\n")
        self.retire(keep_last, keep)

    def _tell(self, saving: Saving) -> None:
        saving.told = True
        self.say(
            f"saved {self.folder / self._name} (training stood still for {saving.stall_seconds:.2f} s,"
            f" written in {saving.write_seconds:.2f} s)"
        )

    def _failure(self, error: BaseException) -> BaseException:
        return write_failure(error, self.folder.parent) if is_write_failure(error) else error

    def _raise_failure(self, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, AbandonedError):
            raise self._failure(error)

    def _open(self, checkpoint: Checkpoint, engine: Any) -> StoredState:
        stored = StoredState(checkpoint, check=self.process.is_main)
        stored.require_names(name for name, _ in engine.module.named_parameters())
        return stored

    def _make_room(self, parameters: int, aside: Path) -> str:
        """Make the folder to write in, and a name for this save that no other has. On rank 0."""
        shutil.rmtree(aside, ignore_errors=True)
        needed = parameters * BYTES_PER_PARAMETER + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: a checkpoint needs about {needed / 1e6:.0f} MB and the disk has"
                f" {free / 1e6:.0f} MB free; make room and start again: the run resumes from its last"
                " checkpoint"
            )
        (aside / TRAINING).mkdir(parents=True)
        return uuid.uuid4().hex

    @contextlib.contextmanager
    def _removed_on_failure(self, aside: Path) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self.process.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise


def verify_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint through. Raises UserError, naming the file, unless it is whole and unchanged."""
    checkpoint = read_checkpoint(folder)
    verify_files(folder)
    with StoredState(checkpoint):
        return checkpoint


def weights_record(folder: Path) -> dict[str, FileRecord]:
    """What the model folder in a checkpoint says of its weights, by relative path."""
    size, known = (folder / MODEL / WEIGHTS).stat().st_size, read_json(folder / MODEL / SETTINGS)
    return {f"{MODEL}/{WEIGHTS}": FileRecord(size, known["weights_sha256"])}


def random_file(rank: int) -> str:
    """Where a rank's random generators are, relative to the checkpoint."""
    return f"{TRAINING}/random-rank-{rank:05d}.safetensors"


def write_failure(error: BaseException, folder: Path) -> UserError:
    """The line for a failed write: what failed, and what is still there to continue from."""
    names = checkpoint_names(folder / "checkpoints")
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
