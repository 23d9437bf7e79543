"""The work items of preparation: pure functions of their fields and the files they name.

A task may run in any process, more than once, and be killed at any moment: what it returns, and the
files it leaves, are the same.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from spikescale.data_pipeline.clean.record import Record, record_path
from spikescale.data_pipeline.clean.unknown import UnknownLimit
from spikescale.data_pipeline.clean.work import CleanedPartition
from spikescale.data_pipeline.placed import Batch, placed_batches, placed_documents
from spikescale.data_pipeline.quarantine import Quarantine, SoundPartition, quarantine_intact
from spikescale.data_pipeline.shards import ShardInfo, ShardWriter, finished_shard
from spikescale.data_pipeline.sources import Partition
from spikescale.data_pipeline.split import SPLITS, SplitSettings
from spikescale.data_pipeline.stages import stage
from spikescale.data_pipeline.tokenizers import Tokenizer, load_tokenizer
from spikescale.data_pipeline.tokenizers.conditioned import ConditionedTokenizer
from spikescale.data_pipeline.tokenizers.huggingface import HuggingFaceTokenizer
from spikescale.data_pipeline.tokenizers.syllable import count_syllables
from spikescale.files import room_needed

Report = Callable[[int, int, int], None]  # documents, tokens and text bytes since the last call


@dataclass(frozen=True)
class Survey:
    """What a first pass over a partition's training documents found.

    Attributes:
        characters: the different ones.
        texts: a sample, each text with the key by which samples of all partitions are merged.
        syllables: how often each occurs.
        metadata: the different (key, value) pairs; elsewhere: those of documents of the other splits.
    """

    characters: frozenset[str] = frozenset()
    texts: tuple[tuple[bytes, str], ...] = ()
    syllables: Mapping[str, int] = field(default_factory=dict)
    metadata: frozenset[tuple[str, str]] = frozenset()
    elsewhere: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class SurveyTask:
    """Look at the training documents of a partition, for a tokenizer that is made from the corpus.

    Attributes:
        what: `characters`; `syllables` of `language` with the characters; `texts`: those with the
            smallest hashes, up to `budget` characters; None: nothing but the metadata.
    """

    partition: Partition
    settings: SplitSettings
    limit: int | None
    what: str | None
    budget: int
    language: str = ""

    def run(self, report: Report) -> Survey:
        """Read the partition."""
        characters: set[str] = set()
        sample = HashSample(self.budget)
        metadata: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}

        def training_texts() -> Iterator[str]:
            for document in placed_documents(SoundPartition(self.partition), self.settings, self.limit):
                metadata[document.split == "train"].update(document.metadata)
                if document.split == "train":
                    if self.what == "texts":
                        sample.add(_sample_key(document.digest), document.text)
                    elif self.what is not None:
                        characters.update(document.text)
                    yield document.text
                report(1, 0, document.size_bytes)

        syllables: Mapping[str, int] = {}
        if self.what == "syllables":
            syllables = count_syllables(training_texts(), self.language)
        else:
            for _ in training_texts():
                pass
        return Survey(
            frozenset(characters),
            tuple(sample.items()),
            syllables,
            frozenset(metadata[True]),
            frozenset(metadata[False] - metadata[True]),
        )


class HashSample:
    """The texts with the smallest keys, as many as it takes to reach `budget` characters.

    The choice depends on the set of texts alone: not on their order, nor on how they were
    partitioned, since the sample of a union is the sample of the samples' union. Equal keys (equal
    texts) count once.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._total = 0
        self._heap: list[tuple[bytes, str]] = []  # the largest key first: keys are complemented
        self._keys: set[bytes] = set()

    def add(self, key: bytes, text: str) -> None:
        """Offer a text."""
        if key in self._keys:
            return
        heapq.heappush(self._heap, (_complement(key), text))
        self._keys.add(key)
        self._total += len(text)
        while self._total - len(self._heap[0][1]) >= self._budget:
            removed, gone = heapq.heappop(self._heap)
            self._keys.discard(_complement(removed))
            self._total -= len(gone)

    def items(self) -> list[tuple[bytes, str]]:
        """Keys and texts in the order of the keys."""
        return sorted((_complement(key), text) for key, text in self._heap)


def _complement(key: bytes) -> bytes:
    return bytes(255 - byte for byte in key)


def _sample_key(digest: bytes) -> bytes:
    # Hashed again: the first bytes of the digest itself decide the split.
    return hashlib.sha256(b"sample" + digest).digest()


@dataclass(frozen=True)
class ShardTask:
    """Turn a partition into its shards, one a split.

    Attributes:
        folder: where shards and the tokenizer's folder are.
        number: the partition's number.
        request: digest of the whole request, kept in sidecars.
        fast: whether tokenizer.json kinds take the fast path (the caller has checked it).
        max_bad_share: of a partition's records that may be quarantined; None: none is, all are refused.
    """

    folder: Path
    number: int
    partition: Partition
    settings: SplitSettings
    limit: int | None
    tokenizer_folder: Path
    tokenizer_sha256: str
    request: str
    fast: bool
    max_bad_share: float | None = None

    def run(self, report: Report) -> list[ShardInfo]:
        """Write the shards, unless they are there and intact, and return what they hold."""
        with room_needed(self.folder):
            return self._run(report)

    def _run(self, report: Report) -> list[ShardInfo]:
        facts: dict[str, Any] = {
            "request": self.request,
            "tokenizer_sha256": self.tokenizer_sha256,
            "partition": self.partition.label,
        }
        cleaned = self.partition if isinstance(self.partition, CleanedPartition) else None
        if cleaned is not None:
            facts["record_sha256"] = cleaned.finished_record()
            facts.update(cleaned.quarantined())
        done = [finished_shard(self.folder, split, self.number, facts) for split in SPLITS]
        finished = [shard for shard in done if shard is not None]
        intact = self.max_bad_share is None or quarantine_intact(self.folder, self.number)
        if len(finished) == len(SPLITS) and intact:
            for shard in finished:
                report(shard.documents, shard.tokens, shard.bytes)
            return finished
        tokenizer = cached_tokenizer(self.tokenizer_folder, self.tokenizer_sha256, self.fast)
        writers = {
            split: ShardWriter(self.folder, split, self.number, tokenizer.vocab_size, tokenizer.eos_id)
            for split in SPLITS
        }
        quarantine = Quarantine(self.folder, self.number, self.partition, self.max_bad_share)
        try:
            if cleaned is None:
                self._write(quarantine, tokenizer, writers, report)
                facts.update(quarantine.finish())
            else:
                recording, record = cleaned.recording()
                unknown = UnknownLimit.of(tokenizer, cleaned.settings)
                self._write(recording, tokenizer, writers, report, record, unknown)
                facts["record_sha256"] = record.write(record_path(self.folder, self.number))
                facts.update(cleaned.quarantined())
            with stage("writing"):
                return [writers[split].finish(**facts) for split in SPLITS]
        finally:
            quarantine.abandon()
            for writer in writers.values():
                writer.abandon()

    def _write(
        self,
        partition: Partition,
        tokenizer: Tokenizer,
        writers: dict[str, ShardWriter],
        report: Report,
        record: Record | None = None,
        unknown: UnknownLimit | None = None,
    ) -> None:
        batches = placed_batches(partition, self.settings, self.limit)
        while True:
            with stage("reading"):
                batch = next(batches, None)
            if batch is None:
                return
            _write_batch(tokenizer, writers, batch, report, record, unknown)


def _write_batch(
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
    batch: Batch,
    report: Report,
    record: Record | None,
    unknown: UnknownLimit | None,
) -> None:
    with stage("tokenising"):
        encoded = tokenizer.encode_arrays(batch.texts)
    if unknown is not None and record is not None:
        found = zip(encoded, batch.texts, batch.places, strict=True)
        known = [not unknown.drops(ids, text, place, record) for ids, text, place in found]
        batch, encoded = batch.only(known), list(compress(encoded, known))
    if isinstance(tokenizer, ConditionedTokenizer):
        encoded = [
            np.concatenate([np.array(tokenizer.prefix(metadata, digest), np.int64), ids])
            for metadata, digest, ids in zip(batch.metadata, batch.digests, encoded, strict=True)
        ]
    with stage("writing"):
        for split, part, ids in batch.by_split(encoded):
            writers[split].add_all(ids, sum(part.sizes), sum(map(len, part.texts)), part.places)
        if record is not None:
            for text in batch.texts:
                record.written(len(text))
    report(len(batch), sum(map(len, encoded)) + len(encoded), sum(batch.sizes))


_loaded: dict[tuple[str, bool], Any] = {}


def cached_tokenizer(folder: Path, sha256: str, fast: bool) -> Tokenizer:
    """The saved tokenizer, loaded once a process."""
    key = (sha256, fast)
    if key not in _loaded:
        tokenizer = load_tokenizer(folder)
        if isinstance(tokenizer.text_tokenizer, HuggingFaceTokenizer):
            tokenizer.text_tokenizer.use_fast_path("require" if fast else "off", sample=None)
        _loaded.clear()
        _loaded[key] = tokenizer
    loaded: Tokenizer = _loaded[key]
    return loaded
