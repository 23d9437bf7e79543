"""The records of all partitions as one: what a report shows."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from spikescale.data_pipeline.clean.record import SAMPLES, read_record, record_path
from spikescale.data_pipeline.clean.work import cleaning_summary
from spikescale.data_pipeline.manifest import Manifest
from spikescale.errors import UserError
from spikescale.files import read_json


@dataclass
class StageTotals:
    """A stage over all partitions; `dropped` holds documents and characters by rule."""

    name: str
    documents_in: int = 0
    characters_in: int = 0
    documents_out: int = 0
    characters_out: int = 0
    changed: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class CleaningTotals:
    """All stages in their order, and what else was counted.

    Attributes:
        settings: as the request has them.
        lengths: of `before` and `after`, documents by bin (`record.length_bin`).
        samples: by rule, of the whole corpus those with the smallest hashes.
        clusters: of duplicates, None when none were sought.
    """

    settings: dict[str, Any]
    stages: list[StageTotals]
    languages: Counter[str]
    lengths: dict[str, Counter[int]]
    samples: dict[str, list[dict[str, str]]]
    clusters: dict[str, Any] | None


def cleaning_totals(manifest: Manifest) -> CleaningTotals | None:
    """The sums over a folder's records, or None for data that were not cleaned.

    Raises UserError when a record is missing, damaged or of another request.
    """
    request = read_json(manifest.folder / "request.json")
    if "clean" not in request:
        return None
    stages: dict[str, StageTotals] = {}
    languages: Counter[str] = Counter()
    lengths: dict[str, Counter[int]] = {"before": Counter(), "after": Counter()}
    samples: dict[str, list[dict[str, str]]] = {}
    identity = None
    for number in range(manifest.partitions):
        path = record_path(manifest.folder, number)
        record = read_record(path, identity)
        if record is None:
            raise UserError(f"{path}: missing or damaged; run the same `data prepare` again to make it anew")
        identity = record["request"]
        for stage in record["stages"]:
            _add_stage(stages.setdefault(stage["name"], StageTotals(stage["name"])), stage)
        languages.update(record["languages"])
        for when, bins in record["lengths"].items():
            lengths[when].update({int(place): count for place, count in bins.items()})
        for rule, entries in record["samples"].items():
            merged = sorted(
                [*samples.get(rule, []), *entries], key=lambda entry: (entry["key"], entry["place"])
            )
            samples[rule] = merged[:SAMPLES]
    return CleaningTotals(
        settings=request["clean"],
        stages=list(stages.values()),
        languages=languages,
        lengths=lengths,
        samples=samples,
        clusters=cleaning_summary(manifest.folder),
    )


def _add_stage(totals: StageTotals, stage: dict[str, Any]) -> None:
    for name in ("documents_in", "characters_in", "documents_out", "characters_out", "changed"):
        setattr(totals, name, getattr(totals, name) + stage[name])
    for rule, counts in stage["dropped"].items():
        known = totals.dropped.setdefault(rule, [0, 0])
        known[0] += counts["documents"]
        known[1] += counts["characters"]
