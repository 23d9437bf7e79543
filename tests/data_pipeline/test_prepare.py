"""Preparation: shards that megatron-core reads, the same bytes however the work was done or interrupted."""

import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from spikescale.data_pipeline.manifest import Manifest, load_manifest
from spikescale.data_pipeline.prepare import PrepareSettings, opened_job, prepare
from spikescale.data_pipeline.shards import ShardWriter, document_lengths, dtype_for
from spikescale.data_pipeline.sources import Document, Source, open_source
from spikescale.data_pipeline.split import SplitSettings, chunks, split_of
from spikescale.data_pipeline.stream import iterate_documents
from spikescale.data_pipeline.tasks import HashSample
from spikescale.data_pipeline.tokenizers import load_tokenizer
from spikescale.errors import UserError

Snapshot = Callable[[Path], dict[str, bytes]]


def source_of(path: Path) -> Source:
    return open_source([str(path)], partition_bytes=path.stat().st_size // 10 + 1)


def serial(**settings: object) -> PrepareSettings:
    return PrepareSettings(ray=False, quiet=True, **settings)  # type: ignore[arg-type]


def decoded(manifest: Manifest, split: str) -> list[str]:
    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    return [tokenizer.decode(ids.tolist()) for ids in iterate_documents(manifest, split)]


def test_every_document_arrives_once_in_the_split_of_its_hash(prepared: Manifest, texts: list[str]) -> None:
    import hashlib

    settings = SplitSettings()
    for split in ("train", "valid", "test"):
        expected = [
            text for text in texts if split_of(hashlib.sha256(text.encode()).digest(), settings) == split
        ]
        assert decoded(prepared, split) == expected
        totals = prepared.totals(split)
        assert totals.documents == len(expected)
        assert totals.bytes == sum(len(text.encode()) for text in expected)
        assert totals.characters == sum(map(len, expected))
        assert totals.tokens == totals.bytes + totals.documents
    assert prepared.partitions == 10 and len(prepared.splits["train"]) == 10
    assert 330 < prepared.totals("train").documents < 385


def test_megatron_core_reads_the_shards_back(prepared: Manifest) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for split, shards in prepared.splits.items():
        ours = iterate_documents(prepared, split)
        for shard in shards:
            theirs = IndexedDataset(str(shard.path.with_suffix("")))
            assert len(theirs) == shard.documents
            assert theirs.document_indices.tolist() == list(range(shard.documents + 1))
            for number in range(len(theirs)):
                document = np.array(theirs[number])
                assert document.dtype == np.uint16 and document[-1] == 255
                np.testing.assert_array_equal(document, next(ours))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, np.uint16), (1 << 17, np.int32)])
def test_files_are_those_of_megatron_cores_own_writer(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    documents = [generator.integers(vocab_size - 1, size=size) for size in (3, 0, 1, 700, 12)]
    writer = ShardWriter(tmp_path, "train", 0, vocab_size, eos_id=vocab_size - 1)
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for number, ids in enumerate(documents):
        writer.add(ids, len(ids), len(ids), f"document {number}")
        theirs.add_item(torch.from_numpy(np.append(ids, vocab_size - 1)))
        theirs.end_document()
    theirs.finalize(str(tmp_path / "theirs.idx"))
    shard = writer.finish()
    assert shard.path.read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert shard.index_path.read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert document_lengths(shard).tolist() == [4, 1, 2, 701, 13]


def test_sidecars_hold_counts_checksums_and_the_source_partition(prepared: Manifest) -> None:
    shard = prepared.splits["train"][3]
    sidecar = json.loads(shard.path.with_suffix(".json").read_text())
    assert sidecar["number"] == 3 and sidecar["split"] == "train" and sidecar["path"] == "train-00003.bin"
    assert sidecar["partition"].startswith("corpus.jsonl[")
    assert sidecar["tokenizer_sha256"] == prepared.tokenizer.sha256
    assert sidecar["tokens"] * 2 == shard.path.stat().st_size
    assert sidecar["bin_sha256"] == shard.sha256 and sidecar["max_id"] == 255
    names = {path.name for path in prepared.folder.iterdir()}
    # A partition that gave a split nothing has a sidecar that says so, and no token file.
    for number in range(10):
        for split in ("valid", "test"):
            stem = f"{split}-{number:05d}"
            content = json.loads((prepared.folder / f"{stem}.json").read_text())
            assert (f"{stem}.bin" in names) == (f"{stem}.idx" in names) == (content["tokens"] > 0)


def test_running_again_after_an_interruption_makes_only_what_is_missing(
    prepared: Manifest, prepared_copy: Path, jsonl: Path, snapshot: Snapshot
) -> None:
    expected = snapshot(prepared.folder)
    (prepared_copy / "manifest.json").unlink()
    (prepared_copy / "train-00004.json").unlink()
    (prepared_copy / "train-00006.bin").write_bytes(b"torn")
    (prepared_copy / ".tmp-123-train-00007.bin").write_bytes(b"left behind")
    before = {path.name: path.stat().st_mtime_ns for path in prepared_copy.iterdir()}
    prepare(source_of(jsonl), prepared_copy, serial())
    assert snapshot(prepared_copy) == expected
    after = {path.name: path.stat().st_mtime_ns for path in prepared_copy.iterdir()}
    rewritten = {name[6:11] for name in after if name.endswith(".bin") and before.get(name) != after[name]}
    rewritten |= {name[6:11] for name in ("train-00004.bin",) if before[name] != after[name]}
    assert rewritten <= {"00004", "00006", "0004.", "0006."} and len(rewritten) >= 2


def test_a_different_request_into_the_same_folder_needs_overwrite(
    prepared: Manifest, prepared_copy: Path, jsonl: Path, snapshot: Snapshot
) -> None:
    other = serial(split=SplitSettings(valid_fraction=0.2))
    with pytest.raises(UserError, match=r"holds data prepared otherwise \(split differ\).*--overwrite"):
        prepare(source_of(jsonl), prepared_copy, other)
    assert snapshot(prepared_copy) == snapshot(prepared.folder)
    manifest = prepare(source_of(jsonl), prepared_copy, serial(split=other.split, overwrite=True))
    assert manifest.sha256 != prepared.sha256
    assert 55 < manifest.totals("valid").documents < 110
    load_manifest(prepared_copy)
    foreign = prepared_copy.parent / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a data folder; choose another"):
        prepare(source_of(jsonl), foreign, serial(overwrite=True))
    assert (foreign / "thesis.txt").exists()


def test_one_process_at_a_time_writes_into_a_folder_and_the_next_may_wait(
    tmp_path: Path, jsonl: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    descriptor = os.open(output, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for patience in (0.0, 0.2):
        with (
            pytest.raises(UserError, match="another `data prepare` is writing there"),
            opened_job(source_of(jsonl), output, serial(), patience),
        ):
            pass
    threading.Timer(0.3, os.close, (descriptor,)).start()
    with opened_job(source_of(jsonl), output, serial(), 60.0) as job:
        assert job.tasks


def test_exact_duplicates_fall_into_one_split(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts + texts[::-1]))
    manifest = prepare(source_of(path), tmp_path / "out", serial())
    found = {split: decoded(manifest, split) for split in manifest.splits}
    for split, documents in found.items():
        assert len(documents) == 2 * len(set(documents)) > 0
        for other in set(found) - {split}:
            assert not set(documents) & set(found[other])


def test_a_split_without_documents_is_refused_and_chunks_help(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    text = "\n\n".join(f"Paragraph {number}. " + "word " * 60 for number in range(200))
    path.write_text(text)
    with pytest.raises(UserError, match=r"would be empty: .* of 1 documents .*--split-unit chunk"):
        prepare(source_of(path), tmp_path / "whole", serial())
    assert not (tmp_path / "whole" / "manifest.json").exists()
    settings = SplitSettings(unit="chunk", chunk_characters=700)
    manifest = prepare(source_of(path), tmp_path / "chunks", serial(split=settings))
    pieces = [piece for split in manifest.splits for piece in decoded(manifest, split)]
    assert sorted(pieces) == sorted(chunks(text, 700))
    assert all(manifest.totals(split).documents >= 4 for split in manifest.splits)
    only_train = SplitSettings(valid_fraction=0, test_fraction=0)
    whole = prepare(source_of(path), tmp_path / "train", serial(split=only_train))
    assert decoded(whole, "train") == [text] and whole.splits["valid"] == []


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000])
def test_chunks_are_consecutive_bounded_and_end_where_text_does(size: int) -> None:
    text = "One two three.\nFour five.\n\nSix seven eight nine ten.\n" * 5 + "x" * 40
    pieces = list(chunks(text, size))
    assert "".join(pieces) == text and all(0 < len(piece) <= size for piece in pieces)
    if size == 10:
        assert pieces[0] == "One two "


def test_documents_of_a_data_sets_own_splits_stay_there(tmp_path: Path, texts: list[str]) -> None:
    class Part:
        size_bytes = 0

        def __init__(self, split: str, documents: list[str]) -> None:
            self.label = self.split = split
            self._documents = documents

        def documents(self) -> Iterator[Document]:
            return (Document(text, "here") for text in self._documents)

    class Own:
        name = "own"

        def identity(self) -> dict[str, object]:
            return {}

        def partitions(self) -> list[Part]:
            return [Part("train", texts[:10]), Part("valid", texts[10:13]), Part("test", texts[13:15])]

    manifest = prepare(Own(), tmp_path / "out", serial())  # type: ignore[arg-type]
    assert [manifest.totals(split).documents for split in ("train", "valid", "test")] == [10, 3, 2]
    assert decoded(manifest, "valid") == texts[10:13]
    assert [shard.number for shard in manifest.splits["test"]] == [2]


def test_the_document_limit_is_spread_over_the_partitions(tmp_path: Path, jsonl: Path) -> None:
    manifest = prepare(source_of(jsonl), tmp_path / "out", serial(limit_documents=105))
    per_partition = [0] * 10
    for shards in manifest.splits.values():
        for shard in shards:
            per_partition[shard.number] += shard.documents
    assert sum(per_partition) == 105 and set(per_partition) == {10, 11}


def test_a_character_vocabulary_is_that_of_the_training_split_alone(tmp_path: Path) -> None:
    texts = [f"{chr(0x4E00 + number)} document" for number in range(300)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = prepare(source_of(path), tmp_path / "out", serial(tokenizer="char"))
    train = set("".join(decoded(manifest, "train")))
    assert manifest.tokenizer.vocab_size == len(train) + 2
    assert all(text.startswith("\ufffd") for text in decoded(manifest, "valid"))


def test_a_sentencepiece_tokenizer_is_trained_reproducibly_on_the_training_split(
    tmp_path: Path, jsonl: Path, texts: list[str]
) -> None:
    settings = serial(tokenizer="sentencepiece:360", tokenizer_sample_characters=30_000)
    one = prepare(source_of(jsonl), tmp_path / "one", settings)
    two = prepare(
        open_source([str(jsonl)], partition_bytes=jsonl.stat().st_size // 3), tmp_path / "two", settings
    )
    assert one.tokenizer == two.tokenizer and one.tokenizer.kind == "sentencepiece"
    assert sorted(text for split in one.splits for text in decoded(one, split)) == sorted(texts)


def test_a_hash_sample_does_not_depend_on_order_or_partition() -> None:
    pairs = [(bytes([number * 37 % 251, number % 256]), "x" * (1 + number % 9)) for number in range(500)]
    whole = HashSample(300)
    merged = HashSample(300)
    for begin in range(0, 500, 70):
        part = HashSample(300)
        for key, text in reversed(pairs[begin : begin + 70]):
            part.add(key, text)
        for key, text in part.items():
            merged.add(key, text)
    for key, text in pairs:
        whole.add(key, text)
        whole.add(key, text)
    assert whole.items() == merged.items() == sorted(pairs)[: len(whole.items())]
    assert 300 <= sum(len(text) for _, text in whole.items()) < 309


def test_ids_that_do_not_fit_are_an_error_never_wrapped(tmp_path: Path) -> None:
    assert dtype_for(65536) == np.uint16 and dtype_for(65537) == np.int32
    with pytest.raises(UserError, match="do not fit"):
        dtype_for(2**31 + 1)
    for vocab_size, wrong in ((65536, 65536), (300, 300), (300, -1), (70000, 70000)):
        writer = ShardWriter(tmp_path, "train", 0, vocab_size, eos_id=2)
        with pytest.raises(UserError, match=f"a.txt: token id {wrong} is outside 0..{vocab_size - 1} "):
            writer.add(np.array([5, wrong]), 1, 1, "a.txt")
    writer = ShardWriter(tmp_path, "train", 0, 300, eos_id=2)
    with pytest.raises(UserError, match="the text itself gives the end-of-document id 2"):
        writer.add(np.array([5, 2, 7]), 1, 1, "a.txt")
    assert list(tmp_path.iterdir()) == []
    writer = ShardWriter(tmp_path, "train", 0, 70000, eos_id=2)
    writer.add(np.array([5, 69999]), 1, 1, "a.txt")
    writer.finish()
    assert np.fromfile(tmp_path / "train-00000.bin", dtype=np.int32).tolist() == [5, 69999, 2]


def test_malformed_input_stops_preparation_without_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 2: not valid Unicode \(lone surrogate U\+D800\)"):
        prepare(open_source([str(path)]), tmp_path / "out", serial())
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert "manifest.json" not in names and not any(name.startswith(".tmp-") for name in names)


class KillOnce:
    """A partition whose first reader is killed by the system in the middle."""

    split = None

    def __init__(self, inner: object, flag: Path) -> None:
        self._inner = inner
        self._flag = flag
        self.label, self.size_bytes = inner.label, inner.size_bytes  # type: ignore[attr-defined]

    def documents(self) -> Iterator[Document]:
        for number, document in enumerate(self._inner.documents()):  # type: ignore[attr-defined]
            if number == 10 and not self._flag.exists():
                self._flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield document


@pytest.mark.slow
@pytest.mark.distributed
class TestOnRay:
    """One local Ray for all of these."""

    @pytest.fixture(scope="class", autouse=True)
    def cluster(self) -> Iterator[None]:
        import ray

        # The workers cannot import a test module: its classes travel whole.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()

    def test_two_workers_give_the_bytes_of_one_process(
        self, tmp_path: Path, jsonl: Path, snapshot: Snapshot
    ) -> None:
        """With a tokenizer made from the corpus, so that both passes run on the workers."""
        for ray in (True, False):
            settings = PrepareSettings(tokenizer="char", workers=2, ray=ray, quiet=True)
            prepare(source_of(jsonl), tmp_path / f"{ray}", settings)
        assert snapshot(tmp_path / "True") == snapshot(tmp_path / "False")

    def test_a_worker_killed_in_the_middle_changes_nothing(
        self, tmp_path: Path, prepared: Manifest, jsonl: Path, snapshot: Snapshot
    ) -> None:
        source = source_of(jsonl)
        inner = source.partitions()
        flags = [tmp_path / "killed-2", tmp_path / "killed-7"]
        inner[2] = KillOnce(inner[2], flags[0])  # type: ignore[call-overload]
        inner[7] = KillOnce(inner[7], flags[1])  # type: ignore[call-overload]
        source.partitions = lambda: inner  # type: ignore[method-assign]
        prepare(source, tmp_path / "out", PrepareSettings(workers=2, quiet=True))
        assert all(flag.exists() for flag in flags)
        assert snapshot(tmp_path / "out") == snapshot(prepared.folder)

    def test_bad_input_found_by_a_worker_is_the_same_one_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a"}\n' * 50 + "{broken\n" + '{"text": "a"}\n' * 50)
        messages = []
        for ray in (True, False):
            with pytest.raises(UserError) as caught:
                settings = PrepareSettings(workers=2, ray=ray, quiet=True)
                prepare(source_of(path), tmp_path / f"out-{ray}", settings)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert messages[0].startswith(f"{path}, line 51: not valid JSON")
