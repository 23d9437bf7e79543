"""Preparation: from a source to a folder of numbered shards, a tokenizer and a manifest.

    partitions -> (first pass, where the tokenizer is made from the corpus) -> shards -> manifest

The partitions, and so the shards, depend on the request alone: neither the number of workers, nor
Ray, nor how often the job was killed and begun again, changes a byte of the result.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spikescale.data_pipeline.append import Earlier, extend
from spikescale.data_pipeline.clean import CleanSettings
from spikescale.data_pipeline.clean.record import FOLDER as CLEAN
from spikescale.data_pipeline.clean.unknown import UnknownLimit
from spikescale.data_pipeline.clean.work import clean_corpus, cleaning_is_finished, remove_work, work_folder
from spikescale.data_pipeline.live import FAILED, HEAD, LOG
from spikescale.data_pipeline.manifest import FILE as MANIFEST
from spikescale.data_pipeline.manifest import (
    REQUEST,
    TOKENIZER_FOLDER,
    Manifest,
    load_manifest,
    request_digest,
    write_manifest,
)
from spikescale.data_pipeline.placed import placed_documents
from spikescale.data_pipeline.pools import Pool, SerialPool, ray_pool
from spikescale.data_pipeline.position import split_by_position
from spikescale.data_pipeline.progress import Progress
from spikescale.data_pipeline.quarantine import PATTERN, SUMMARY, SoundPartition, summarise
from spikescale.data_pipeline.shards import ShardInfo, dtype_for
from spikescale.data_pipeline.sources import Partition, Source
from spikescale.data_pipeline.split import SPLITS, SplitSettings
from spikescale.data_pipeline.tasks import HashSample, ShardTask, Survey, SurveyTask
from spikescale.data_pipeline.tokenizers import Tokenizer, load_tokenizer, make_tokenizer, parse_spec
from spikescale.data_pipeline.tokenizers.base import DESCRIPTION
from spikescale.data_pipeline.tokenizers.conditioned import ConditionedTokenizer, conditioned
from spikescale.data_pipeline.tokenizers.huggingface import Fast, HuggingFaceTokenizer
from spikescale.errors import UserError
from spikescale.files import read_json, room_needed, sweep_temporaries, write_json

CHECK_DOCUMENTS = 64  # of the corpus, on which the fast path is compared with HF
CHECK_CHARACTERS = 500_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareSettings:
    """How a source is prepared.

    Attributes:
        tokenizer: a specification, see `parse_spec`; eos: its end-of-document token, if unusual.
        split: how documents are divided into train, valid and test.
        limit_documents: read about so many, spread evenly over the partitions; None reads all.
        tokenizer_sample_characters: training text of a SentencePiece tokenizer.
        fast: auto, require or off: the fast path of tokenizer.json kinds.
        condition_on: keys of the documents' metadata whose values become ids in front of each document;
            the source must have been asked for them (`ReadOptions.metadata_keys`).
        condition_dropout: share of the documents that are left without.
        workers: processes. ray: run them on Ray; ray_address: of a running cluster, on which another
            `ray_others` processes want cores at the same time.
        clean: how documents are cleaned first; by default not at all.
        bad_records: refuse or quarantine. max_bad_share: of a partition's and of the job's records, that
            may be quarantined before the job stops.
        overwrite: replace what another request left in the folder.
        append: add to the data set that is in the folder; its tokenizer, splits and shards stay.
        quiet: show no progress.
    """

    tokenizer: str = "byte"
    eos: str | None = None
    split: SplitSettings = field(default_factory=SplitSettings)
    limit_documents: int | None = None
    tokenizer_sample_characters: int = 10_000_000
    fast: Fast = "auto"
    condition_on: tuple[str, ...] = ()
    condition_dropout: float = 0.1
    workers: int = 1
    ray: bool = True
    ray_address: str | None = None
    ray_others: int = 0
    clean: CleanSettings = field(default_factory=CleanSettings)
    bad_records: Literal["refuse", "quarantine"] = "refuse"
    max_bad_share: float = 0.01
    overwrite: bool = False
    append: bool = False
    quiet: bool = False


def prepare(source: Source, output: Path, settings: PrepareSettings) -> Manifest:
    """Prepare `source` in the folder `output` and return the manifest.

    Begun again after a kill, it keeps the finished shards that verify and makes the others. Raises
    UserError for malformed input, for a folder with other content, and for a split left without
    documents.
    """
    with opened_job(source, output, settings) as job:
        if job.made:
            return load_manifest(job.folder, verify="size")
        with _progress("preparing", job.partitions, settings) as progress:
            shards = list(itertools.chain.from_iterable(job.pool.run(job.tasks, progress)))
        job.finish(shards)
    return load_manifest(job.folder, verify="size")


@dataclass(frozen=True)
class Job:
    """A preparation that holds its folder and is ready to make shards.

    Attributes:
        folder: where. source: the source's name.
        partitions: the parts of the source. tasks: one for each, in the same order.
        tokenizer: made or loaded, and saved in the folder.
        request: digest of all that the result depends on.
        pool: where the tasks can be run.
        settings: those that were asked for.
        made: the whole data set is there already, and there are no tasks.
        earlier: shards that were there before, in front of those of the tasks.
    """

    folder: Path
    source: str
    partitions: list[Partition]
    tasks: list[ShardTask]
    tokenizer: Tokenizer
    request: str
    pool: Pool
    settings: PrepareSettings
    made: bool = False
    earlier: Earlier = field(default_factory=Earlier)

    @property
    def dtype(self) -> np.dtype:
        """Of the token files."""
        return dtype_for(self.tokenizer.vocab_size)

    def complete(self) -> bool:
        """Whether all is made already, manifest and files; sizes are compared, checksums are not."""
        if self.made:
            return True
        if not (self.folder / MANIFEST).exists():
            return False
        manifest = load_manifest(self.folder, verify="size")
        return manifest.requests[-1:] == ((self.request, self.earlier.partitions + len(self.partitions)),)

    def finish(self, shards: Sequence[ShardInfo]) -> None:
        """Write the manifest over all shards.

        Raises UserError for a split left without documents, and for too many bad records.
        """
        if self.settings.bad_records == "quarantine":
            summarise(self.folder, len(self.partitions), self.settings.max_bad_share)
        _require_documents([*self.earlier.shards, *shards], self.partitions, self.settings.split)
        earlier = self.earlier
        write_manifest(
            self.folder,
            self.tokenizer,
            self.dtype,
            [*earlier.shards, *shards],
            earlier.partitions + len(self.partitions),
            f"{earlier.source} + {self.source}" if earlier.source else self.source,
        )
        if self.settings.clean.active:
            remove_work(self.folder)


@contextlib.contextmanager
def opened_job(
    source: Source, output: Path, settings: PrepareSettings, patience: float = 0.0
) -> Iterator[Job]:
    """Everything before the first shard: claim the folder, start the workers, make the tokenizer.

    Waits `patience` seconds for another process to leave the folder.
    """
    spec = parse_spec(settings.tokenizer)
    if settings.workers < 1:
        raise UserError(f"workers = {settings.workers}: must be at least 1")
    if settings.limit_documents is not None and settings.limit_documents < 1:
        raise UserError(f"limit_documents = {settings.limit_documents}: must be at least 1")
    if not 0 <= settings.max_bad_share <= 1:
        raise UserError(f"max_bad_share = {settings.max_bad_share}: must be between 0 and 1")
    max_bad_share = settings.max_bad_share if settings.bad_records == "quarantine" else None
    by = settings.split.by or getattr(source, "split_by", None) or "hash"
    settings = replace(settings, split=replace(settings.split, by=by))
    if by == "position" and settings.limit_documents is not None:
        raise UserError("--split-by position needs the whole text: leave out --limit-documents")
    partitions = source.partitions()
    request = _request(source, partitions, settings)
    output = Path(output).absolute()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made a folder ({error.strerror})") from None
    with _locked(output, patience), room_needed(output):
        earlier = Earlier()
        if settings.append:
            if settings.clean.active or settings.bad_records == "quarantine":
                raise UserError(
                    "--append does not clean and has no quarantine: clean the new text in a folder of its own"
                    " and mix them (data.sources), or prepare both together"
                )
            request, earlier = extend(output, request)
        _claim(output, request, settings.overwrite)
        if by == "position":
            with _progress("measuring", partitions, settings) as progress:
                partitions = split_by_position(partitions, settings.split, progress)
        limits = _limits(len(partitions), settings.limit_documents)
        digest = request_digest(request)
        complete = settings.clean.active and (output / MANIFEST).exists()
        if complete and cleaning_is_finished(output, len(partitions), digest, max_bad_share is not None):
            remove_work(output)
            tokenizer = load_tokenizer(output / TOKENIZER_FOLDER)
            yield Job(
                output, source.name, partitions, [], tokenizer, digest, SerialPool(), settings, made=True
            )
            return
        with _pool(settings, len(partitions)) as pool:
            if settings.clean.active:
                with _progress("cleaning", partitions, settings) as progress:
                    partitions = clean_corpus(
                        output,
                        partitions,
                        limits,
                        settings.split,
                        settings.clean,
                        digest,
                        pool,
                        progress,
                        max_bad_share,
                    )
                limits = [None] * len(partitions)
            tokenizer = _tokenizer(output, spec, pool, partitions, limits, settings)
            UnknownLimit.of(tokenizer, settings.clean)  # refuses a limit that means nothing
            fast = _fast_path(tokenizer, partitions, settings)
            tasks = [
                ShardTask(
                    folder=output,
                    number=number,
                    partition=partition,
                    settings=settings.split,
                    limit=limit,
                    tokenizer_folder=output / TOKENIZER_FOLDER,
                    tokenizer_sha256=tokenizer.sha256,
                    request=digest,
                    fast=fast,
                    max_bad_share=max_bad_share,
                )
                for number, (partition, limit) in enumerate(
                    zip(partitions, limits, strict=True), earlier.partitions
                )
            ]
            yield Job(
                output, source.name, partitions, tasks, tokenizer, digest, pool, settings, earlier=earlier
            )


def _request(source: Source, partitions: Sequence[Partition], settings: PrepareSettings) -> dict[str, Any]:
    described = json.dumps([[partition.label, partition.size_bytes] for partition in partitions])
    tokenizer: dict[str, Any] = {"spec": settings.tokenizer, "eos": settings.eos}
    if settings.tokenizer.startswith("sentencepiece"):
        tokenizer["sample_characters"] = settings.tokenizer_sample_characters
    if settings.condition_on:
        tokenizer["condition_on"] = list(settings.condition_on)
        tokenizer["condition_dropout"] = settings.condition_dropout
    cleaning = {"clean": settings.clean.identity()} if settings.clean.active else {}
    request: dict[str, Any] = {
        "version": 1,
        **cleaning,
        "source": {"name": source.name, **source.identity()},
        "partitions": {"count": len(partitions), "sha256": hashlib.sha256(described.encode()).hexdigest()},
        "tokenizer": tokenizer,
        "split": settings.split.described(),
        "limit_documents": settings.limit_documents,
    }
    if settings.bad_records != "refuse":
        request["bad_records"] = settings.bad_records
    return request


@contextlib.contextmanager
def _locked(folder: Path, patience: float) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    until = time.monotonic() + patience
    try:
        while not _lock(descriptor):
            if time.monotonic() > until:
                raise UserError(f"{folder}: another `data prepare` is writing there")
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _claim(folder: Path, request: dict[str, Any], overwrite: bool) -> None:
    """Make sure that the folder is empty or holds this very request's work."""
    ours = {HEAD, FAILED, LOG}
    entries = [
        entry for entry in folder.iterdir() if not entry.name.startswith(".tmp-") and entry.name not in ours
    ]
    if entries:
        path = folder / REQUEST
        if not path.exists():
            raise UserError(f"{folder}: is not empty and not a data folder; choose another")
        earlier = read_json(path)
        if earlier != request:
            if not overwrite:
                keys = sorted({*request, *earlier})
                changed = ", ".join(key for key in keys if earlier.get(key) != request.get(key))
                raise UserError(
                    f"{folder}: holds data prepared otherwise ({changed} differ); "
                    "choose another folder, or --overwrite"
                )
            _clear(folder)
    sweep_temporaries(folder)
    sweep_temporaries(folder / TOKENIZER_FOLDER)
    sweep_temporaries(folder / CLEAN)
    sweep_temporaries(work_folder(folder))
    if not (folder / REQUEST).exists():
        write_json(folder / REQUEST, request)


def _clear(folder: Path) -> None:
    # The manifest first: without it nothing takes the folder for complete; the request last, so that
    # a kill in between leaves a folder that is still known for ours.
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / HEAD).unlink(missing_ok=True)
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    shutil.rmtree(folder / CLEAN, ignore_errors=True)
    for split in SPLITS:
        for path in folder.glob(f"{split}-*"):
            if path.suffix in (".bin", ".idx", ".json"):
                path.unlink()
    for path in (folder / SUMMARY, *folder.glob(PATTERN)):
        path.unlink(missing_ok=True)
    (folder / REQUEST).unlink(missing_ok=True)


def _limits(count: int, total: int | None) -> list[int | None]:
    if total is None:
        return [None] * count
    return [total * (number + 1) // count - total * number // count for number in range(count)]


@contextlib.contextmanager
def _pool(settings: PrepareSettings, tasks: int) -> Iterator[Pool]:
    if not settings.ray:
        yield SerialPool()
        return
    with ray_pool(min(settings.workers, tasks), settings.ray_address, settings.ray_others) as pool:
        yield pool


def _progress(title: str, partitions: Sequence[Partition], settings: PrepareSettings) -> Progress:
    return Progress(title, [partition.size_bytes for partition in partitions], quiet=settings.quiet)


def _tokenizer(
    output: Path,
    spec: Any,
    pool: Pool,
    partitions: Sequence[Partition],
    limits: Sequence[int | None],
    settings: PrepareSettings,
) -> Tokenizer:
    folder = output / TOKENIZER_FOLDER
    if (folder / DESCRIPTION).exists():
        # Of this very request, begun before (its description is written last), or of what is added to.
        tokenizer = load_tokenizer(folder)
        if settings.append and isinstance(tokenizer, ConditionedTokenizer):
            surveys = _surveys(None, "", pool, partitions, limits, settings)
            found = {pair for survey in surveys for pair in survey.metadata | survey.elsewhere}
            _announce_unknown({pair for pair in found if not tokenizer.knows(pair)})
        return tokenizer
    characters: set[str] = set()
    texts: list[str] = []
    syllables: Counter[str] = Counter()
    metadata: set[tuple[str, str]] = set()
    elsewhere: set[tuple[str, str]] = set()
    if spec.learns_from is not None or settings.condition_on:
        sample = HashSample(settings.tokenizer_sample_characters)
        for survey in _surveys(spec.learns_from, spec.language, pool, partitions, limits, settings):
            characters |= survey.characters
            syllables.update(survey.syllables)
            metadata |= survey.metadata
            elsewhere |= survey.elsewhere
            for key, text in survey.texts:
                sample.add(key, text)
        texts = [text for _, text in sample.items()]
        if spec.learns_from is not None and not characters and not texts:
            raise UserError(f"tokenizer {spec.text}: the training split has no documents to learn from")
    tokenizer = make_tokenizer(
        spec, characters=characters, texts=texts, eos=settings.eos, syllables=syllables
    )
    if settings.condition_on:
        _announce_unknown(elsewhere - metadata)
        tokenizer = conditioned(tokenizer, settings.condition_on, metadata, settings.condition_dropout)
    tokenizer.save(folder)
    return tokenizer


def _surveys(
    what: str | None,
    language: str,
    pool: Pool,
    partitions: Sequence[Partition],
    limits: Sequence[int | None],
    settings: PrepareSettings,
) -> list[Survey]:
    budget = settings.tokenizer_sample_characters
    tasks = [
        SurveyTask(partition, settings.split, limit, what, budget, language)
        for partition, limit in zip(partitions, limits, strict=True)
    ]
    with _progress("reading for the tokenizer", partitions, settings) as progress:
        return pool.run(tasks, progress)


def _announce_unknown(pairs: set[tuple[str, str]]) -> None:
    if pairs:
        shown = ", ".join(f"{key}={value}" for key, value in sorted(pairs)[:10])
        more = f" and {len(pairs) - 10} more" if len(pairs) > 10 else ""
        logger.warning(
            "%s%s: not in the training split; such documents go without that condition", shown, more
        )


def _fast_path(tokenizer: Tokenizer, partitions: Sequence[Partition], settings: PrepareSettings) -> bool:
    tokenizer = tokenizer.text_tokenizer
    if not isinstance(tokenizer, HuggingFaceTokenizer) or settings.fast == "off":
        return False
    sample: list[str] = []
    characters = 0
    for partition in partitions[:4]:
        documents = placed_documents(SoundPartition(partition), settings.split, CHECK_DOCUMENTS // 4)
        for document in documents:
            sample.append(document.text[: CHECK_CHARACTERS // 16])
            characters += len(sample[-1])
            if characters > CHECK_CHARACTERS:
                break
    return tokenizer.use_fast_path(settings.fast, sample)


def _require_documents(
    shards: Sequence[ShardInfo], partitions: Sequence[Partition], settings: SplitSettings
) -> None:
    total = sum(shard.documents for shard in shards)
    if total == 0:
        raise UserError("the source has no documents")
    own_splits = any(partition.split for partition in partitions)
    for split in SPLITS:
        count = sum(shard.documents for shard in shards if shard.split == split)
        if count == 0 and not own_splits and settings.expects(split):
            if split == "train":
                share = 1 - settings.valid_fraction - settings.test_fraction
            else:
                share = getattr(settings, f"{split}_fraction")
            raise UserError(
                f"split {split} would be empty: a share of {share:g} of {total} documents is due there; use "
                "more text, --split-unit chunk, --split-on to cut files into documents, or another fraction"
            )
