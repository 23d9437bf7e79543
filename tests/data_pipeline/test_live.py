"""Reading a data set while it is made: waiting, asking, giving up; and how far ahead it is made."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from spikescale.data_pipeline import live
from spikescale.data_pipeline.live import Head, LiveDataset, write_failure
from spikescale.data_pipeline.manifest import Manifest, load_manifest, request_digest
from spikescale.data_pipeline.producer import LookAhead, reading_order
from spikescale.data_pipeline.stream import Loader, TokenStream
from spikescale.errors import UserError

T, SEED, K = 32, 2, 3


@pytest.fixture
def growing(tmp_path: Path, prepared: Manifest) -> Path:
    """A folder with everything but the shards and the manifest."""
    folder = tmp_path / "live"
    shutil.copytree(prepared.folder / "tokenizer", folder / "tokenizer")
    request = json.loads((prepared.folder / "request.json").read_text())
    shutil.copy(prepared.folder / "request.json", folder)
    name = prepared.dtype.name
    Head(request_digest(request), "files", prepared.partitions, name, prepared.tokenizer, 2).write(folder)
    return folder


def add_shards(folder: Path, prepared: Manifest, *numbers: int) -> None:
    for number in numbers:
        for path in sorted(
            prepared.folder.glob(f"*-{number:05d}.*"), key=lambda path: path.suffix == ".json"
        ):
            shutil.copy(path, folder)


def test_samples_are_those_of_the_finished_data_in_every_epoch(growing: Path, prepared: Manifest) -> None:
    asked: list[tuple[int, int]] = []
    stream = TokenStream(LiveDataset(growing, lambda *need: asked.append(need)), "train", T, SEED, K)
    finished = TokenStream(prepared, "train", T, SEED, K)
    order = reading_order(prepared.partitions, SEED, K)
    assert sorted(order) == list(range(prepared.partitions))

    def make() -> None:
        for number in order:
            time.sleep(0.02)
            add_shards(growing, prepared, number)

    maker = threading.Thread(target=make)
    maker.start()
    count = finished.samples_per_epoch * 2 + 17
    assert torch.equal(stream.rows(0, count), finished.rows(0, count))
    maker.join()
    # Asked in the order in which they are made, window by window, and no further than was needed.
    wanted = [number for first, stop in asked for number in range(first, stop)]
    assert wanted == order
    assert stream.position(count)["epoch"] == finished.position(count)["epoch"] == 2


def test_positions_go_from_live_to_finished_data_and_not_to_others(growing: Path, prepared: Manifest) -> None:
    add_shards(growing, prepared, *range(prepared.partitions))
    with Loader(TokenStream(LiveDataset(growing), "train", T, SEED, K), 8) as loader:
        for _ in range(5):
            next(loader)
        state = loader.state_dict()
    assert state["manifest"].startswith("request:") and state["partitions"] == prepared.partitions
    finished = TokenStream(prepared, "train", T, SEED, K)
    with Loader(finished, 8) as loader:
        loader.load_state_dict(state)
        assert torch.equal(next(loader)[0], finished.rows(40, 8))
    with Loader(TokenStream(LiveDataset(growing), "train", T, SEED, K), 8) as loader:
        loader.load_state_dict(state)
        with pytest.raises(UserError, match="manifest was 'request:f"):
            loader.load_state_dict({**state, "manifest": "request:ffff"})
    with pytest.raises(UserError, match="manifest was"):
        Loader(finished, 8).load_state_dict({**state, "manifest": "request:ffff"})


def test_validation_asks_for_nothing_ahead(growing: Path, prepared: Manifest) -> None:
    add_shards(growing, prepared, 0, 1)
    asked: list[tuple[int, int]] = []
    data = LiveDataset(growing, lambda *need: asked.append(need))
    expected = [shard for shard in prepared.splits["valid"] if shard.number < 2]
    assert [shard.bin_sha256 for shard in data.shards("valid")] == [shard.bin_sha256 for shard in expected]
    assert data.totals("train").tokens > 0 and not asked


def test_a_reader_that_waits_can_be_interrupted_and_is_told_of_failures(
    growing: Path, prepared: Manifest
) -> None:
    loader = Loader(TokenStream(LiveDataset(growing), "train", T, SEED, K), 8)
    assert not loader.ready(0.3)
    loader.close()
    add_shards(growing, prepared, *range(prepared.partitions))
    assert loader.ready(20)
    assert torch.equal(next(loader)[0], TokenStream(prepared, "train", T, SEED, K).rows(0, 8))
    loader.close()
    (growing / "train-00000.json").unlink()
    write_failure(growing, "corpus.jsonl, line 3: not valid JSON")
    with pytest.raises(UserError, match="line 3: not valid JSON"):
        LiveDataset(growing).shards_between("train", 0, 1)


def test_a_damaged_shard_is_not_waited_for(
    growing: Path, prepared: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "UNUSABLE_SECONDS", 0.3)
    add_shards(growing, prepared, 0, 1)
    path = growing / "train-00001.bin"
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    with pytest.raises(UserError, match=r"train-00001.bin: is missing or not what its sidecar says"):
        LiveDataset(growing).shards_between("train", 0, 2)
    # A shard of another request is as good as none: it will be written over.
    sidecar = growing / "train-00000.json"
    sidecar.write_text(sidecar.read_text().replace(load_manifest(prepared.folder).requests[0][0], "other"))
    with pytest.raises(UserError, match=r"train-00000.bin"):
        LiveDataset(growing).shards_between("train", 0, 1)


def test_shards_are_made_no_further_ahead_than_asked(prepared: Manifest) -> None:
    numbers = [4, 5, 6, 0, 1, 2, 3]
    ahead = LookAhead(numbers, 2, 10**9, lambda content: None)
    assert [ahead.admits(place) for place in range(4)] == [True, True, False, False]
    ahead.need(4, 7)
    assert [ahead.admits(place) for place in range(7)] == [True] * 5 + [False] * 2
    ahead.need(99, 100)  # not among them: as after an end
    assert not ahead.admits(5) and ahead.held
    # In bytes: what was made and is not being read counts, what is needed is made however large.
    shard = prepared.splits["train"][0]
    small = LookAhead(numbers, 100, 1, lambda content: None)
    assert small.admits(6)
    small.finished(0, [shard], {"reading": 1.0})
    assert not small.admits(1)
    small.need(4, 6)
    assert small.admits(1) and small.admits(2)
    small.finished(2, [shard], {})
    assert not small.admits(3) and small.admits(1)
