"""A checkpoint put together into one part, belonging to no layout of ranks."""

import shutil
import uuid
from pathlib import Path

from spikescale import files
from spikescale.errors import UserError
from spikescale.training.checkpoint import random_file, verify_checkpoint, weights_record
from spikescale.training.checkpoint_files import MODEL, STATE, TRAINING, Checkpoint, write_index
from spikescale.training.fragments import StoredState, whole_fragments, write_part


def consolidate(source: Path, destination: Path) -> Checkpoint:
    """Write the checkpoint `source` as one with a single part to `destination`, which must not exist.

    Weights, moments and metrics are the same to the bit; one parameter at a time is in memory. The random
    generators' states are kept only of a checkpoint that one rank wrote. Raises UserError when `source` is
    damaged or `destination` is occupied; on any failure `destination` is left as it was.
    """
    if destination.exists():
        raise UserError(f"{destination}: already exists")
    checkpoint = verify_checkpoint(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = files.temporary_path(destination)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        (aside / TRAINING).mkdir(parents=True)
        shutil.copytree(source / MODEL, aside / MODEL)
        state = {**checkpoint.state, "save": uuid.uuid4().hex, "parts": 1, "layout": None}
        with StoredState(checkpoint) as stored:
            records = write_part(aside, whole_fragments(stored), state["save"], 0, 1)
        layout = checkpoint.layout
        if layout is not None and layout["ranks"] == 1:
            state["layout"] = layout
            shutil.copyfile(source / random_file(0), aside / random_file(0))
        files.write_json(aside / STATE, state)
        known = records | weights_record(aside)
        write_index(aside, {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in known.items()})
        for path in aside.rglob("*"):
            if path.is_dir():
                files.fsync_folder(path)
            else:
                files.fsync_file(path)
        made = verify_checkpoint(aside)
        aside.replace(destination)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    files.fsync_folder(destination.parent)
    return Checkpoint(destination, made.state)
