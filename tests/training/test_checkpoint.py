"""Checkpoints: whole or noticed, retained by rule, read without executing anything."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch

from spikescale.errors import UserError
from spikescale.training.bootstrap import Process
from spikescale.training.checkpoint import CheckpointFolder, verify_checkpoint, write_index
from spikescale.training.engine import restricted_reader


@pytest.fixture
def checkpoints(tmp_path):
    """Five published checkpoints; the second has the lowest validation loss."""
    for number, loss in enumerate([3.0, 1.0, 2.5, 2.0, 1.5], 1):
        folder = tmp_path / f"step-{number:08d}"
        (folder / "engine").mkdir(parents=True)
        (folder / "engine" / "weights.pt").write_bytes(bytes([number]) * 100)
        (folder / "state.json").write_text(json.dumps({"step": number, "metrics": {"valid_loss": loss}}))
        write_index(folder)
    return CheckpointFolder(tmp_path, Process(0, 1, 0, 1, torch.device("cpu")))


def test_the_last_k_and_the_best_are_kept(checkpoints):
    checkpoints.retire(keep_last=2)
    assert checkpoints.names() == ["step-00000002", "step-00000004", "step-00000005"]
    assert (checkpoints.folder / "best").read_text() == "step-00000002\n"
    for name in checkpoints.names():
        verify_checkpoint(checkpoints.folder / name)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda file: file.unlink(), "missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "has 99 bytes, 100 were written"),
        (lambda file: file.write_bytes(b"x" * 100), "checksum differs"),
    ],
)
def test_damage_is_named_and_the_newest_whole_checkpoint_is_found(checkpoints, damage, complaint):
    file = checkpoints.folder / "step-00000005" / "engine" / "weights.pt"
    damage(file)
    with pytest.raises(UserError, match=complaint):
        verify_checkpoint(checkpoints.folder / "step-00000005")
    assert checkpoints.newest_valid().step == 4
    assert checkpoints.names()[-1] == "step-00000004"
    assert (checkpoints.folder / "damaged-step-00000005").is_dir()


def test_a_folder_without_an_index_is_not_a_checkpoint(checkpoints):
    (checkpoints.folder / "step-00000005" / "index.json").unlink()
    assert checkpoints.newest_valid().step == 4


def test_what_a_kill_left_behind_is_swept_at_the_next_start(checkpoints):
    torn = checkpoints.folder / ".tmp-step-00000006"
    torn.mkdir()
    (torn / "part").write_bytes(b"1")
    CheckpointFolder(checkpoints.folder, checkpoints.process)
    assert not torn.exists()
    assert len(checkpoints.names()) == 5


class Intruder:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_that_names_a_function_is_refused_and_not_executed(tmp_path):
    bait = tmp_path / "executed"
    torch.save({"module": Intruder(bait)}, tmp_path / "state.pt")
    reader = restricted_reader(SimpleNamespace())
    with pytest.raises(UserError, match="was not loaded"):
        reader.load(tmp_path / "state.pt")
    assert not bait.exists()
    with (tmp_path / "state.pt").open("rb"), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "state.pt", weights_only=True)
