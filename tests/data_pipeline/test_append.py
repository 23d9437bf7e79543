"""Adding shards at the end: old bytes stay, a run goes on mid-epoch without them and has them in the next."""

import json
from pathlib import Path

import pytest
import torch

from spikescale.data_pipeline.manifest import Manifest, load_manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import open_source
from spikescale.data_pipeline.split import SplitSettings
from spikescale.data_pipeline.stream import Loader, TokenStream
from spikescale.errors import UserError

T = 32


def write(path: Path, first: int, count: int) -> Path:
    lines = [
        json.dumps({"text": f"text {number} " + "more " * (20 + number % 9)}) + "\n"
        for number in range(first, first + count)
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make(path: Path, output: Path, **settings: object) -> Manifest:
    source = open_source([str(path)], partition_bytes=2500)
    return prepare(source, output, PrepareSettings(ray=False, quiet=True, **settings))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(write(tmp_path / "old.jsonl", 0, 150), tmp_path / "data")
    write(tmp_path / "new.jsonl", 1000, 90)
    return tmp_path


def stream_of(manifest: Manifest) -> TokenStream:
    return TokenStream(manifest, "train", T, seed=5, shuffle_window=3)


def test_what_was_there_stays_and_the_new_follows(folder: Path) -> None:
    old = load_manifest(folder / "data")
    files = {path.name: path.read_bytes() for path in (folder / "data").glob("*-*.*")}
    new = make(folder / "new.jsonl", folder / "data", append=True)
    alone = make(folder / "new.jsonl", folder / "alone")
    assert new.partitions == old.partitions + alone.partitions > old.partitions
    assert all((folder / "data" / name).read_bytes() == content for name, content in files.items())
    for split in ("train", "valid", "test"):
        added = [shard for shard in new.splits[split] if shard.number >= old.partitions]
        assert [shard.bin_sha256 for shard in added] == [shard.bin_sha256 for shard in alone.splits[split]]
    assert new.prefix_identity(old.partitions) == old.sha256 and new.source == "files + files"
    # The same words again change nothing; other text is one more addition.
    assert make(folder / "new.jsonl", folder / "data", append=True).sha256 == new.sha256
    third = make(write(folder / "third.jsonl", 5000, 30), folder / "data", append=True)
    assert third.prefix_identity(new.partitions) == new.sha256
    assert [count for _, count in third.requests] == [old.partitions, new.partitions, third.partitions]


def test_an_addition_that_was_killed_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spikescale.data_pipeline import tasks

    old = load_manifest(folder / "data")
    run, done = tasks.ShardTask.run, []

    def killed(self, report):  # type: ignore[no-untyped-def]
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(self.number)
        return run(self, report)

    monkeypatch.setattr(tasks.ShardTask, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        make(folder / "new.jsonl", folder / "data", append=True)
    assert done == [old.partitions, old.partitions + 1]
    assert load_manifest(folder / "data").sha256 == old.sha256  # until it is finished
    monkeypatch.undo()
    with pytest.raises(UserError, match="another addition was begun there"):
        make(write(folder / "third.jsonl", 5000, 30), folder / "data", append=True)
    whole = make(folder / "new.jsonl", folder / "data", append=True)
    make(folder / "old.jsonl", folder / "again")
    assert make(folder / "new.jsonl", folder / "again", append=True).sha256 == whole.sha256


@pytest.mark.parametrize("begun", ["in the first epoch", "in the second epoch"])
def test_the_epoch_that_was_begun_ends_as_it_was_and_the_next_has_all(folder: Path, begun: str) -> None:
    old = load_manifest(folder / "data")
    before = stream_of(old)
    length = before.samples_per_epoch
    steps = 4 if begun == "in the first epoch" else length // 8 + 3
    loader = Loader(before, 8)
    for _ in range(steps):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    new = make(folder / "new.jsonl", folder / "data", append=True)
    resumed = Loader(stream_of(new), 8)
    resumed.load_state_dict(state)
    end = length if begun == "in the first epoch" else 2 * length
    rest = torch.cat([next(resumed)[0] for _ in range((end - 8 * steps) // 8)])
    assert torch.equal(rest, before.rows(8 * steps, len(rest)))
    # The next epoch: every sample of the whole data set once, in the order of that epoch's number.
    whole = stream_of(new)
    epoch = 1 if begun == "in the first epoch" else 2
    found = resumed.stream.rows(end, whole.samples_per_epoch)
    assert torch.equal(found, whole.rows(epoch * whole.samples_per_epoch, whole.samples_per_epoch))
    # And it goes on from a position in that epoch, on any number of ranks, from the new data alone.
    for _ in range(3 + (end - 8 * steps) % 8):
        next(resumed)
    later = json.loads(json.dumps(resumed.state_dict()))
    expected = next(resumed)[0]
    resumed.close()
    parts = [Loader(stream_of(new), 8, rank, 2) for rank in range(2)]
    for part in parts:
        part.load_state_dict(later)
    assert torch.equal(torch.cat([next(part)[0] for part in parts]), expected)
    for part in parts:
        part.close()
    with pytest.raises(UserError, match="cannot continue in the data"):
        Loader(before, 8).load_state_dict({**later, "partitions": new.partitions, "manifest": new.sha256})


def test_additions_that_do_not_fit_are_refused(folder: Path) -> None:
    data = folder / "data"
    with pytest.raises(UserError, match=r"tokenizer was .*byte.* and is now .*char"):
        make(folder / "new.jsonl", data, append=True, tokenizer="char")
    with pytest.raises(UserError, match="split was"):
        make(folder / "new.jsonl", data, append=True, split=SplitSettings(valid_fraction=0.2))
    with pytest.raises(UserError, match="holds no manifest"):
        (folder / "empty").mkdir()
        (folder / "empty" / "x").write_text("")
        make(folder / "new.jsonl", folder / "empty", append=True)
    with pytest.raises(UserError, match="--append does not clean"):
        make(folder / "new.jsonl", data, append=True, bad_records="quarantine")
    assert load_manifest(data).partitions == make(folder / "old.jsonl", data).partitions
