"""Who makes the data of a run while it reads them: a producer for each data set that has a stream."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from spikescale.config import RunConfig, SourceConfig
from spikescale.data_pipeline.clean import CleanSettings
from spikescale.data_pipeline.feeder import ProducerProcess
from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.producer import ProducerJob, clean_settings
from spikescale.data_pipeline.sources.base import chosen_options
from spikescale.errors import UserError

POLL_SECONDS = 0.05


class Production:
    """The producers of a run, by the names of their data sets; on other ranks than 0 there are none.

    Use as a context manager: at the end all of them end, and what they have made stays.
    """

    def __init__(self, jobs: Mapping[str, ProducerJob] | None = None) -> None:
        self.producers = {name: ProducerProcess(job) for name, job in (jobs or {}).items()}

    def __enter__(self) -> "Production":
        try:
            for producer in self.producers.values():
                producer.__enter__()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all producers; they take their time side by side."""
        for producer in self.producers.values():
            producer.end()
        for producer in self.producers.values():
            producer.close()

    def wait_for_heads(self, seconds: float) -> bool:
        """Whether every data set has its tokenizer and validation shards; waits so long at most.

        Raises UserError as soon as any of them cannot be made.
        """
        until = time.monotonic() + seconds
        # All are asked each time: one that failed must not be hidden by one that is slow.
        while sum(producer.wait_for_head(0) for producer in self.producers.values()) < len(self.producers):
            if time.monotonic() > until:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def made(self) -> list[str]:
        """The names of the data sets that are complete."""
        return [name for name, producer in self.producers.items() if producer.complete]


def producer_jobs(config: RunConfig, prepared: Mapping[str, Manifest]) -> dict[str, ProducerJob]:
    """What each stream asks for, by name, with the order in which this run reads it.

    prepared: the data sets that are not streamed, by name. Raises UserError.
    """
    parts = config.data.parts
    # Validation reads of each data set its share; one without validation tokens leaves it to the others.
    whole = sum(part.weight or 0.0 for part in parts if _has_validation(part, prepared))
    on_clusters = Counter[str | None]()
    for part in parts:
        if part.stream is not None and part.stream.ray == "cluster":
            on_clusters[part.stream.ray_address] += part.stream.workers
    jobs = {}
    for part in parts:
        if part.stream is not None:
            share = (part.weight or 0.0) / whole if _has_validation(part, prepared) else 1.0
            tokens = math.ceil(config.train.evaluate_tokens * share)
            others = 0
            if part.stream.ray == "cluster":
                others = on_clusters[part.stream.ray_address] - part.stream.workers
            jobs[part.label] = _job(config, part, tokens, others)
    return jobs


def _has_validation(part: SourceConfig, prepared: Mapping[str, Manifest]) -> bool:
    if part.stream is not None:
        return part.stream.valid_fraction > 0
    return prepared[part.label].totals("valid").tokens > 0


def _job(config: RunConfig, part: SourceConfig, valid_tokens: int, ray_others: int) -> ProducerJob:
    data, stream = config.data, part.stream
    assert stream is not None
    names = ("text_key", "split_on", "format", "encoding")
    plain = {name: getattr(stream, name) for name in names}
    options = chosen_options(stream.bad_records, stream.condition_on, stream.partition_mib, None, **plain)
    split = {"valid_fraction": stream.valid_fraction, "test_fraction": stream.test_fraction}
    where = f"data.sources: {part.label}: stream" if data.sources else "data.stream"
    return ProducerJob(
        output=str(Path(part.path).absolute()),
        source=list(stream.source),
        options=options,
        catalogs=[str(path) for path in stream.catalogs],
        settings={
            "tokenizer": stream.tokenizer,
            "eos": stream.eos,
            "split": split,
            "limit_documents": stream.limit_documents,
            "condition_on": list(stream.condition_on),
            "condition_dropout": stream.condition_dropout,
            "bad_records": stream.bad_records,
            "max_bad_share": stream.max_bad_share,
            "clean": _cleaning(stream.clean, f"{where}.clean"),
            "tokenizer_sample_characters": int(stream.tokenizer_sample_mchars * 1_000_000),
            "workers": 1 if stream.ray == "none" else stream.workers,
            "ray": stream.ray != "none",
            "ray_address": stream.ray_address,
            "ray_others": ray_others,
        },
        seed=data.seed,
        shuffle_window=data.shuffle_window,
        valid_tokens=valid_tokens,
        ahead_shards=stream.look_ahead_shards,
        ahead_bytes=stream.look_ahead_mib << 20,
    )


def _cleaning(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of cleaning, checked here so that a mistake is told before anything starts."""
    known = sorted(field.name for field in fields(CleanSettings))
    for name in given:
        if name not in known:
            raise UserError(f"{where}: unknown key {name}; allowed here: {', '.join(known)}")
    return asdict(clean_settings(given, where))
