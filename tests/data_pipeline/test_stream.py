"""The order of samples: a pure function of manifest, seed and index, for any number of ranks."""

import dataclasses
import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.order import permutation
from spikescale.data_pipeline.stream import Loader, TokenStream, iterate_documents, split_tokens
from spikescale.errors import UserError

T = 32


@pytest.fixture
def stream(prepared: Manifest) -> TokenStream:
    return TokenStream(prepared, "train", T, seed=3, shuffle_window=4)


def test_an_epoch_holds_every_slice_of_every_shard_once(prepared: Manifest, stream: TokenStream) -> None:
    expected = [
        (shard.number, offset)
        for shard in prepared.splits["train"]
        for offset in range(0, shard.tokens - T, T)
    ]
    assert stream.samples_per_epoch == len(expected) > 500
    for epoch in (0, 1):
        located = [stream.locate(epoch * len(expected) + index) for index in range(len(expected))]
        places = [(shard.number, offset) for shard, offset in located]
        assert sorted(places) == expected
        assert places != expected
    first = [stream.locate(index)[1] for index in range(50)]
    second = [stream.locate(len(expected) + index)[1] for index in range(50)]
    assert first != second


def test_samples_are_the_tokens_of_their_slice(prepared: Manifest, stream: TokenStream) -> None:
    for index in (0, 1, 17, stream.samples_per_epoch - 1, 3 * stream.samples_per_epoch + 5):
        shard, offset = stream.locate(index)
        tokens = np.fromfile(shard.path, dtype=np.uint16)[offset : offset + T + 1]
        sample = stream.sample(index)
        assert sample.dtype == np.int64 and sample.shape == (T + 1,)
        np.testing.assert_array_equal(sample, tokens)


def test_batches_are_consecutive_samples_across_epochs(prepared: Manifest, stream: TokenStream) -> None:
    size = 48
    per_epoch = stream.samples_per_epoch // size
    for index in (0, per_epoch, 2 * per_epoch + 1):
        batch = stream.batch(index, size)
        assert batch.dtype == torch.int64 and batch.shape == (size, T + 1)
        for row in range(size):
            np.testing.assert_array_equal(batch[row].numpy(), stream.sample(index * size + row))
    again = TokenStream(prepared, "train", T, seed=3, shuffle_window=4)
    assert torch.equal(again.batch(per_epoch, size), stream.batch(per_epoch, size))
    other = TokenStream(prepared, "train", T, seed=4, shuffle_window=4)
    assert not torch.equal(other.batch(0, size), stream.batch(0, size))


def test_windows_of_neighbouring_shards_follow_one_another(stream: TokenStream) -> None:
    windows = [stream.locate(index)[0].number // 4 for index in range(stream.samples_per_epoch)]
    runs = [windows[0]] + [new for old, new in itertools.pairwise(windows) if new != old]
    assert sorted(runs) == [0, 1, 2]
    first_window = [stream.locate(index)[0].number for index in range(windows.count(runs[0]))]
    assert len(set(first_window[:40])) > 1  # the window's shards are mixed


def test_the_order_within_a_window_needs_that_windows_shards_alone(prepared: Manifest) -> None:
    """As when later shards are still being made: the order does not change when they come."""

    def order(manifest: Manifest) -> dict[int, list[tuple[int, int]]]:
        stream = TokenStream(manifest, "train", T, seed=1, shuffle_window=4)
        windows: dict[int, list[tuple[int, int]]] = {}
        for index in range(stream.samples_per_epoch):
            shard, offset = stream.locate(index)
            windows.setdefault(shard.number // 4, []).append((shard.number, offset))
        return windows

    whole = order(prepared)
    for shards, windows in ((slice(0, 8), (0, 1)), (slice(4, None), (1, 2))):
        partial = dataclasses.replace(prepared, splits={"train": prepared.splits["train"][shards]})
        assert order(partial) == {window: whole[window] for window in windows}


def test_the_order_is_fixed_for_good() -> None:
    """Resuming relies on it: these numbers must never change."""
    assert permutation(8, 0, 0, 1, 0).tolist() == [7, 6, 4, 5, 3, 1, 0, 2]
    assert sorted(permutation(1000, 5, 2, 1, 7).tolist()) == list(range(1000))


@pytest.mark.parametrize(("world", "micro"), [(1, None), (1, 3), (2, None), (2, 2), (4, 1), (12, 1)])
def test_ranks_together_see_the_same_batches_for_any_world_size(
    stream: TokenStream, prepared: Manifest, world: int, micro: int | None
) -> None:
    loaders = [Loader(stream, 12, rank, world, micro) for rank in range(world)]
    for step in range(5):
        parts = [next(loader) for loader in loaders]
        for part in parts:
            assert all(len(piece) == (micro or 12 // world) for piece in part)
        together = torch.cat([piece for part in parts for piece in part])
        assert torch.equal(together, stream.batch(step, 12))
    for loader in loaders:
        loader.close()


def test_the_state_counts_what_was_received_and_continues_anywhere(
    prepared: Manifest, stream: TokenStream
) -> None:
    with Loader(stream, 12, 0, 1) as loader:
        for _ in range(7):
            next(loader)
        state = loader.state_dict()
        seventh = next(loader)[0]
    assert state["samples"] == 84
    assert all(isinstance(value, int | str) for value in state.values())
    assert torch.equal(seventh, stream.batch(7, 12))
    resumed = [Loader(TokenStream(prepared, "train", T, 3, 4), 12, rank, 2) for rank in range(2)]
    for loader in resumed:
        loader.load_state_dict(state)
    assert torch.equal(torch.cat([next(loader)[0] for loader in resumed]), seventh)
    # Another batch size continues with the next sample that was not seen.
    wider = Loader(stream, 20)
    wider.load_state_dict(state)
    assert torch.equal(next(wider)[0], stream.rows(84, 20))
    for loader in [*resumed, wider]:
        loader.close()


def test_a_loader_can_go_back_while_it_reads_ahead(stream: TokenStream) -> None:
    with Loader(stream, 12) as loader:
        start = loader.state_dict()
        first = [next(loader)[0] for _ in range(4)]
        loader.load_state_dict(start)
        again = [next(loader)[0] for _ in range(4)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert loader.wait_seconds > 0
    assert not any(thread.name == "token-loader" for thread in threading.enumerate())


def test_other_data_or_another_order_is_not_continued(prepared: Manifest, stream: TokenStream) -> None:
    state = Loader(stream, 12).state_dict()
    changed = {
        "seed": TokenStream(prepared, "train", T, seed=9, shuffle_window=4),
        "context_length": TokenStream(prepared, "train", 16, seed=3, shuffle_window=4),
        "shuffle_window": TokenStream(prepared, "train", T, seed=3, shuffle_window=2),
        "manifest": TokenStream(dataclasses.replace(prepared, sha256="f" * 64), "train", T, 3, 4),
    }
    for name, other in changed.items():
        with pytest.raises(UserError, match=f"cannot continue in the data: {name} was"):
            Loader(other, 12).load_state_dict(state)


def test_impossible_batches_and_lengths_are_refused_with_the_numbers(
    prepared: Manifest, stream: TokenStream
) -> None:
    with pytest.raises(UserError, match="batch_size 10 does not divide over 4 ranks"):
        Loader(stream, 10, 0, 4)
    with pytest.raises(UserError, match="gives 6 samples a rank, which micro_batch_size 4 does not divide"):
        Loader(stream, 12, 0, 2, 4)
    longest = max(shard.tokens for shard in prepared.splits["valid"])
    assert TokenStream(prepared, "valid", longest - 1).samples_per_epoch >= 1
    with pytest.raises(
        UserError, match=f"it takes {longest + 1} tokens in one shard, the longest has {longest}"
    ):
        TokenStream(prepared, "valid", longest)
    with pytest.raises(UserError, match="shuffle_window = 0"):
        TokenStream(prepared, "train", T, 0, 0)


def test_a_shard_that_vanishes_reaches_the_consumer_as_one_line(prepared_copy, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from spikescale.data_pipeline.manifest import load_manifest

    manifest = load_manifest(prepared_copy)
    stream = TokenStream(manifest, "train", T)
    for shard in manifest.splits["train"]:
        shard.path.write_bytes(shard.path.read_bytes()[:100])
    with pytest.raises(UserError, match="it has 100 bytes"), Loader(stream, 4) as loader:
        next(loader)


def test_a_split_as_one_sequence_and_as_documents_is_the_same_tokens(prepared: Manifest) -> None:
    for split in prepared.splits:
        whole = np.concatenate([np.fromfile(shard.path, np.uint16) for shard in prepared.splits[split]])
        tokens = split_tokens(prepared, split)
        assert len(tokens) == len(whole) == prepared.totals(split).tokens
        np.testing.assert_array_equal(tokens[:], whole)
        end = prepared.splits[split][0].tokens
        np.testing.assert_array_equal(tokens[end - 5 : end + 5], whole[end - 5 : end + 5])
        assert tokens[10:10].shape == (0,) and tokens[len(whole) - 1 : len(whole) + 9].tolist() == [255]
        documents = list(iterate_documents(prepared, split))
        np.testing.assert_array_equal(np.concatenate(documents), whole)
        assert all(document[-1] == 255 and 255 not in document[:-1] for document in documents)


def test_reading_imports_none_of_the_heavy_packages(prepared: Manifest) -> None:
    script = (
        "import sys\n"
        "from spikescale.data_pipeline.manifest import load_manifest\n"
        "from spikescale.data_pipeline.stream import Loader, TokenStream\n"
        f"next(Loader(TokenStream(load_manifest({str(prepared.folder)!r}), 'train', 32), 4))\n"
        "heavy = {'megatron', 'ray', 'deepspeed', 'mlflow', 'datasets'}\n"
        "heavy |= {'transformers', 'tokenizers', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
