"""Checkpoints: whole or noticed, retained by rule, made of fragments that any layout can read."""

import itertools
import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spikescale.cli.main import main
from spikescale.errors import UserError
from spikescale.files import read_json, sha256_file, write_json
from spikescale.tensor_file import FileRecord, LazyTensor, write_tensors
from spikescale.training.bootstrap import Process
from spikescale.training.checkpoint import CheckpointFolder, random_file, verify_checkpoint
from spikescale.training.checkpoint_files import write_index
from spikescale.training.fragments import Fragment, Shard, StoredState, write_part
from spikescale.training.randomness import random_state
from spikescale.training.saving import AbandonedError, Saving

SHAPES = {"embedding.weight": (7, 4), "mix.weight": (6, 4), "out.weight": (4, 6), "norm.weight": (5,)}
DIVIDED = {"embedding.weight": 0, "mix.weight": 0, "out.weight": 1}  # along which dimension, if at all
KEYS = ("exp_avg", "exp_avg_sq")


def values(name: str, kind: str) -> torch.Tensor:
    """What a parameter's weight or moment is, whole."""
    generator = torch.Generator().manual_seed(sum(map(ord, name + kind)))
    return torch.randn(SHAPES[name], generator=generator)


def local_tensor(name: str, kind: str, shard: Shard | None) -> torch.Tensor:
    """A rank's part of `values`, padded with zeros."""
    whole = values(name, kind)
    if shard is None:
        return whole
    length = -(-whole.shape[shard.dim] // shard.size)
    padding = list(whole.shape)
    padding[shard.dim] = length * shard.size - whole.shape[shard.dim]
    padded = torch.cat([whole, torch.zeros(padding)], shard.dim)
    return padded.narrow(shard.dim, shard.index * length, length).contiguous()


def cuts(length: int, parts: int, name: str) -> list[tuple[int, int]]:
    """`parts` ranges that cover [0, length), some of them empty."""
    generator = torch.Generator().manual_seed(len(name))
    inner = sorted(torch.randint(0, length + 1, (parts - 1,), generator=generator).tolist())
    return list(itertools.pairwise([0, *inner, length]))


def make_checkpoint(
    folder: Path,
    step: int = 1,
    loss: float = 1.0,
    tensor: int = 1,
    replicas: int = 2,
    save: str | None = None,
) -> Path:
    """What `tensor` x `replicas` ranks would have written, with uneven fragments."""
    save = save or f"save{step}"
    (folder / "model").mkdir(parents=True)
    (folder / "training").mkdir()
    write_tensors(folder / "model" / "model.safetensors", {name: values(name, "weight") for name in SHAPES})
    for rank in range(tensor * replicas):
        index, replica = rank % tensor, rank // tensor
        fragments = []
        for name in SHAPES:
            shard = Shard(index, tensor, DIVIDED[name]) if tensor > 1 and name in DIVIDED else None
            if shard is None and index:
                continue
            local = {key: local_tensor(name, key, shard) for key in KEYS}
            shape = tuple(local["exp_avg"].shape)
            start, stop = cuts(math.prod(shape), replicas, name)[replica]
            pieces = {key: tensor.reshape(-1)[start:stop] for key, tensor in local.items()}
            fragments.append(Fragment(name, shape, shard, start, stop, float(step), pieces))
        write_part(folder, fragments, save, rank, tensor * replicas)
        write_tensors(folder / random_file(rank), random_state())
    layout = {"ranks": tensor * replicas, "tensor": tensor, "context": 1, "zero_stage": 1}
    state = {"format": 2, "save": save, "parts": tensor * replicas, "layout": layout, "step": step}
    write_json(folder / "state.json", state | {"metrics": {"valid_loss": loss}})
    write_index(folder)
    return folder


def process(rank: int = 0, ranks: int = 1) -> Process:
    return Process(rank, ranks, rank, ranks, torch.device("cpu"))


@pytest.fixture
def checkpoints(tmp_path):
    """Five published checkpoints of two ranks; the second has the lowest validation loss."""
    for step, loss in enumerate([3.0, 1.0, 2.5, 2.0, 1.5], 1):
        make_checkpoint(tmp_path / f"step-{step:08d}", step, loss)
    return CheckpointFolder(tmp_path, process())


def test_the_last_k_and_the_best_are_kept(checkpoints):
    checkpoints.retire(keep_last=2)
    assert checkpoints.names() == ["step-00000002", "step-00000004", "step-00000005"]
    assert (checkpoints.folder / "best").read_text() == "step-00000002\n"
    for name in checkpoints.names():
        verify_checkpoint(checkpoints.folder / name)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


PART = "training/part-00001-of-00002"


@pytest.mark.parametrize("name", [f"{PART}.safetensors", f"{PART}.json", "model/model.safetensors"])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (Path.unlink, "missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes, .* were written"),
        (flip, "checksum differs"),
    ],
)
def test_damage_is_named_and_the_newest_whole_checkpoint_is_found(
    checkpoints, name, damage, complaint, caplog
):
    newest = checkpoints.folder / "step-00000005"
    damage(newest / name)
    with pytest.raises(UserError, match=f"{Path(name).name}: .*{complaint}"):
        verify_checkpoint(newest)
    assert checkpoints.newest_valid().step == 4
    assert "passed over" in caplog.text
    assert checkpoints.names()[-1] == "step-00000004"
    assert (checkpoints.folder / "damaged-step-00000005").is_dir()
    assert checkpoints.newest_valid(at_most=3).step == 3


def test_a_part_of_another_save_is_passed_over(checkpoints):
    newest, older = (checkpoints.folder / f"step-0000000{step}" for step in (5, 3))
    for suffix in (".json", ".safetensors"):
        shutil.copyfile((older / PART).with_suffix(suffix), (newest / PART).with_suffix(suffix))
    write_index(newest)  # as a faulty copy with fresh checksums would look
    with pytest.raises(UserError, match=r"part-00001-of-00002\.json: belongs to another save"):
        verify_checkpoint(newest)
    assert checkpoints.newest_valid().step == 4


@pytest.mark.parametrize("file", ["index.json", "state.json"])
def test_a_folder_without_its_index_or_state_is_not_a_checkpoint(checkpoints, file):
    (checkpoints.folder / "step-00000005" / file).unlink()
    assert checkpoints.newest_valid().step == 4


def test_a_file_that_nobody_wrote_is_not_accepted(checkpoints):
    (checkpoints.folder / "step-00000005" / "training" / "part.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"part\.pt: is not in the checkpoint's index"):
        verify_checkpoint(checkpoints.folder / "step-00000005")


def test_the_format_of_an_earlier_version_is_refused_and_left_alone(checkpoints):
    state = checkpoints.folder / "step-00000005" / "state.json"
    write_json(state, read_json(state) | {"format": 1})
    with pytest.raises(UserError, match=r"format 1, .*finish the run, or export its model, with the version"):
        checkpoints.newest_valid()
    assert checkpoints.names()[-1] == "step-00000005"


def test_what_a_kill_left_behind_is_swept_at_the_next_start(checkpoints):
    torn = checkpoints.folder / ".tmp-step-00000006"
    torn.mkdir()
    (torn / "part").write_bytes(b"1")
    CheckpointFolder(checkpoints.folder, checkpoints.process)
    assert not torn.exists()
    assert len(checkpoints.names()) == 5


def edit_part(folder: Path, change) -> None:
    file = (folder / PART).with_suffix(".json")
    content = read_json(file)
    change(content["fragments"])
    write_json(file, content)
    write_index(folder)


def widen(fragments):
    fragments["mix.weight"]["start"] -= 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda fragments: fragments.pop("mix.weight"), "no part holds elements from .* of mix.weight"),
        (widen, "mix.weight/exp_avg is missing or has another length"),
        (lambda fragments: fragments["mix.weight"].update(step=9.0), "mix.weight does not fit the one of"),
        (lambda fragments: fragments["norm.weight"].update(shape=[6]), "norm.weight does not fit"),
        (lambda fragments: fragments["norm.weight"].pop("keys"), "entry for norm.weight is not a fragment's"),
    ],
)
def test_fragments_that_do_not_make_a_whole_are_refused(tmp_path, change, complaint):
    folder = make_checkpoint(tmp_path / "step-00000001")
    edit_part(folder, change)
    with pytest.raises(UserError, match=complaint):
        verify_checkpoint(folder)


def test_fragments_that_overlap_are_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "step-00000001")
    first, second = (folder / "training" / f"part-0000{rank}-of-00002" for rank in (0, 1))
    entry = read_json(first.with_suffix(".json"))["fragments"]["mix.weight"]
    content = read_json(second.with_suffix(".json"))
    content["fragments"]["mix.weight"] = entry
    tensors = load_file(second.with_suffix(".safetensors"))
    tensors |= {f"mix.weight/{key}": torch.zeros(entry["stop"] - entry["start"]) for key in KEYS}
    write_tensors(second.with_suffix(".safetensors"), tensors, {"save": "save1"})
    write_json(second.with_suffix(".json"), content)
    write_index(folder)
    with pytest.raises(
        UserError, match=r"part-00001-of-00002\.safetensors: holds elements 0 to .* holds too"
    ):
        verify_checkpoint(folder)


@pytest.mark.parametrize("replicas", [1, 2, 5])
@pytest.mark.parametrize(("wrote", "reads"), itertools.product((1, 2, 3), repeat=2))
def test_any_range_of_any_division_is_read_to_the_bit(tmp_path, wrote, reads, replicas):
    folder = make_checkpoint(tmp_path / "step-00000001", tensor=wrote, replicas=replicas)
    with StoredState(verify_checkpoint(folder)) as stored:
        for name, index in itertools.product(SHAPES, range(reads)):
            shard = Shard(index, reads, DIVIDED[name]) if reads > 1 and name in DIVIDED else None
            shape = tuple(local_tensor(name, "weight", shard).shape)
            for start, stop in cuts(math.prod(shape), 4, name + "x"):
                where = (shape, shard, start, stop)
                expected = local_tensor(name, "weight", shard).reshape(-1)[start:stop]
                assert torch.equal(stored.weights(name, *where), expected)
                for key in KEYS:
                    expected = local_tensor(name, key, shard).reshape(-1)[start:stop]
                    assert torch.equal(stored.moments(name, key, *where), expected), (name, key, where)


def test_another_model_is_refused(tmp_path):
    with StoredState(verify_checkpoint(make_checkpoint(tmp_path / "step-00000001"))) as stored:
        stored.require_names(SHAPES)
        with pytest.raises(UserError, match=r"lacks the parameter other\.weight"):
            stored.require_names([*SHAPES, "other.weight"])
        with pytest.raises(UserError, match=r"has a parameter embedding\.weight"):
            stored.require_names(list(SHAPES)[1:])


def test_tensor_file_is_what_the_library_reads_and_its_record_is_true(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "a": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 3).T,
        "count": torch.tensor(5),
    }
    lazy = LazyTensor(torch.float32, (3, 5), lambda: tensors["a"])
    record = write_tensors(tmp_path / "file", {**tensors, "a": lazy}, {"save": "x"})
    assert record == FileRecord((tmp_path / "file").stat().st_size, sha256_file(tmp_path / "file"))
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="announced as"):
        write_tensors(tmp_path / "file", {"a": LazyTensor(torch.float32, (2,), lambda: torch.zeros(3))})


class TwoWriters:
    """The savings of two ranks, whose threads meet in one folder."""

    def __init__(self, folder: Path, writes) -> None:
        self.published: dict | None = None
        folder.mkdir()
        self.ranks = [Saving(process(rank, 2), folder, writes[rank], self.publish) for rank in range(2)]

    def publish(self, files: dict) -> None:
        self.published = files


def test_rank_0_publishes_when_all_ranks_have_written_and_not_before(tmp_path):
    gate = threading.Event()

    def late():
        assert gate.wait(30)
        return {"b": FileRecord(2, "y")}

    save = TwoWriters(tmp_path / "aside", [lambda: {"a": FileRecord(1, "x")}, late])
    assert save.ranks[0].wait_written() is None
    assert save.ranks[0].wait_published(0.2) is None
    assert save.ranks[0].running
    assert save.published is None
    gate.set()
    assert save.ranks[0].wait_published(30) is None
    assert save.published == {"a": {"bytes": 1, "sha256": "x"}, "b": {"bytes": 2, "sha256": "y"}}
    assert not list((tmp_path / "aside").iterdir())


def test_a_rank_that_cannot_write_keeps_rank_0_from_publishing(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    save = TwoWriters(tmp_path / "aside", [dict, full])
    assert isinstance(save.ranks[1].wait_written(), OSError)
    error = save.ranks[0].wait_published(30)
    assert isinstance(error, UserError)
    assert "rank 1: [Errno 28] No space left" in str(error)
    assert save.published is None


def test_a_save_whose_other_rank_is_dead_can_be_given_up(tmp_path):
    (tmp_path / "aside").mkdir()
    published = []
    saving = Saving(process(0, 2), tmp_path / "aside", dict, published.append)
    assert saving.wait_written() is None
    saving.abandon()
    assert not saving.running
    assert isinstance(saving.error, AbandonedError)
    assert not published


def test_list_shows_losses_layouts_and_marks(checkpoints, capsys):
    checkpoints.retire(keep_last=2)
    (checkpoints.folder / "latest").write_text("step-00000005\n")
    (checkpoints.folder / "step-00000004" / "state.json").write_text("{")
    assert main(["checkpoint", "list", str(checkpoints.folder)]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[1]: line for line in shown.splitlines() if "step-" in line and "│" in line}
    assert all(word in rows["step-00000005"] for word in ("1.5000", "2 ranks, ZeRO 1", "latest"))
    assert "best" in rows["step-00000002"]
    assert "best" not in rows["step-00000005"]
    assert "not readable" in rows["step-00000004"]


def test_verify_names_the_damaged_file_and_fails(checkpoints, capsys):
    assert main(["checkpoint", "verify", str(checkpoints.folder)]) == 0
    assert capsys.readouterr().out.count(": whole") == 5
    flip(checkpoints.folder / "step-00000003" / f"{PART}.safetensors")
    assert main(["checkpoint", "verify", str(checkpoints.folder)]) == 1
    shown = capsys.readouterr().out
    assert shown.count(": whole") == 4
    assert f"{PART}.safetensors: its content is not what was written" in shown
    assert main(["checkpoint", "verify", str(checkpoints.folder / "step-00000003")]) == 1
    assert main(["checkpoint", "verify", str(checkpoints.folder / "step-00000002")]) == 0
    assert main(["checkpoint", "verify", str(checkpoints.folder / "nothing")]) == 2


def test_convert_makes_one_part_with_the_same_bits(tmp_path, capsys):
    source = make_checkpoint(tmp_path / "step-00000001", tensor=3, replicas=2)
    digest = sha256_file(source / "model" / "model.safetensors")
    # a true model folder has settings too, with the checksum that convert takes over
    write_json(source / "model" / "model.json", {"weights_sha256": digest})
    write_index(source)
    output = tmp_path / "whole" / "step-00000001"
    assert main(["checkpoint", "convert", str(source), str(output)]) == 0
    assert "one part" in capsys.readouterr().out
    converted = verify_checkpoint(output)
    assert converted.layout is None
    assert sorted(path.name for path in (output / "training").iterdir()) == [
        "part-00000-of-00001.json",
        "part-00000-of-00001.safetensors",
    ]
    stored = load_file(output / "training" / "part-00000-of-00001.safetensors")
    for name, key in itertools.product(SHAPES, KEYS):
        assert torch.equal(stored[f"{name}/{key}"], values(name, key).reshape(-1))
    assert json.loads((output / "state.json").read_text())["metrics"] == {"valid_loss": 1.0}
    assert main(["checkpoint", "convert", str(source), str(output)]) == 2
    assert "already exists" in capsys.readouterr().err
