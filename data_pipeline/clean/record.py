"""What happened to a partition's documents: counted by stage and rule, with samples of what was dropped."""

import hashlib
import heapq
import json
from collections import Counter
from pathlib import Path
from typing import Any

from spikescale.errors import UserError
from spikescale.files import read_json, write_json

FOLDER = "clean"
SAMPLES = 3  # of each rule and partition
SAMPLE_CHARACTERS = 600
BINS_PER_OCTAVE = 4  # of the histograms of document lengths


def record_path(folder: Path, number: int) -> Path:
    """Where the record of a partition stands in a folder of prepared data."""
    return folder / FOLDER / f"record-{number:05d}.json"


def length_bin(length: int) -> int:
    """The bin of a document's length in characters: bin b holds lengths from 2^(b/4) to below 2^((b+1)/4)."""
    # In whole numbers, so that no machine rounds a length into another bin.
    return (length**BINS_PER_OCTAVE).bit_length() - 1


class Record:
    """Counts that grow while documents are cleaned.

    Args:
        facts: what identifies the partition and the request.
        content: of an earlier record, to go on from.
    """

    def __init__(self, facts: dict[str, Any], content: dict[str, Any] | None = None) -> None:
        self.facts = facts
        content = content or {}
        self._stages: dict[str, dict[str, Any]] = {
            stage["name"]: json.loads(json.dumps(stage)) for stage in content.get("stages", [])
        }
        self.languages: Counter[str] = Counter(content.get("languages", {}))
        self._before: Counter[int] = _from_json(content.get("lengths", {}).get("before", {}))
        self._after: Counter[int] = _from_json(content.get("lengths", {}).get("after", {}))
        self._samples: dict[str, list[tuple[str, str, str, str]]] = {
            rule: [(entry["key"], entry["place"], entry["text"], entry["note"]) for entry in entries]
            for rule, entries in content.get("samples", {}).items()
        }

    def arrived(self, text: str) -> None:
        """A document before anything was done to it."""
        self._before[length_bin(max(1, len(text)))] += 1

    def written(self, characters: int) -> None:
        """A document that went into a shard."""
        self._after[length_bin(max(1, characters))] += 1

    def begin_stage(self, name: str) -> None:
        """Make sure that a stage is in the record, even if no document reaches it."""
        self._stages.setdefault(
            name,
            {
                "name": name,
                "documents_in": 0,
                "characters_in": 0,
                "documents_out": 0,
                "characters_out": 0,
                "changed": 0,
                "dropped": {},
            },
        )

    def passed(self, stage: str, before: int, after: int, changed: bool = False) -> None:
        """A document went through a stage; characters before and after it."""
        counts = self._stages[stage]
        counts["documents_in"] += 1
        counts["characters_in"] += before
        counts["documents_out"] += 1
        counts["characters_out"] += after
        counts["changed"] += int(changed)

    def dropped(self, stage: str, rule: str, text: str, place: str, note: str = "") -> None:
        """A document was dropped by a rule of a stage."""
        counts = self._stages[stage]
        counts["documents_in"] += 1
        counts["characters_in"] += len(text)
        of_rule = counts["dropped"].setdefault(rule, {"documents": 0, "characters": 0})
        of_rule["documents"] += 1
        of_rule["characters"] += len(text)
        key = hashlib.sha256(b"sample" + text.encode("utf-8", "surrogatepass")).hexdigest()
        shown = text[:SAMPLE_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
        samples = self._samples.setdefault(rule, [])
        samples.append((key, place.rpartition("/")[2], shown, note))  # no folder of this machine
        if len(samples) > SAMPLES:
            self._samples[rule] = heapq.nsmallest(SAMPLES, samples)

    def content(self) -> dict[str, Any]:
        """As plain JSON, with a checksum of the rest under `sha256`."""
        described = {
            "version": 1,
            **self.facts,
            "stages": list(self._stages.values()),
            "languages": dict(sorted(self.languages.items())),
            "lengths": {"before": _to_json(self._before), "after": _to_json(self._after)},
            "samples": {
                rule: [
                    {"key": key, "place": place, "text": text, "note": note}
                    for key, place, text, note in sorted(entries)
                ]
                for rule, entries in sorted(self._samples.items())
            },
        }
        return {**described, "sha256": _digest(described)}

    def write(self, path: Path) -> str:
        """Write the record and return its checksum."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = self.content()
        write_json(path, content)
        return str(content["sha256"])


def read_record(path: Path, request: str | None = None) -> dict[str, Any] | None:
    """The content of an intact record (of this request, if one is given), else None."""
    if not path.exists():
        return None
    try:
        content = read_json(path)
        stored = content.pop("sha256")
    except (UserError, KeyError, AttributeError, TypeError):
        return None
    if stored != _digest(content) or (request is not None and content.get("request") != request):
        return None
    return {**content, "sha256": stored}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _to_json(bins: Counter[int]) -> dict[str, int]:
    return {str(number): count for number, count in sorted(bins.items())}


def _from_json(bins: dict[str, int]) -> Counter[int]:
    return Counter({int(number): count for number, count in bins.items()})
