"""What a run trains on: one data set, or a mixture of several, each prepared or still being made."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spikescale.config import DataConfig
from spikescale.data_pipeline.blend import Blend, Ingredient
from spikescale.data_pipeline.feeder import ProducerProcess
from spikescale.data_pipeline.live import LiveDataset
from spikescale.data_pipeline.manifest import Manifest, TokenizerInfo, Totals, load_manifest, total
from spikescale.data_pipeline.stream import TokenStream
from spikescale.errors import UserError


@dataclass(frozen=True)
class Part:
    """One data set.

    Attributes:
        name: how it is called in metrics.
        manifest: what it holds, finished or growing.
        weight: its share of the tokens, relative to the other parts' weights.
        producer: on rank 0, who makes it while it is being read.
    """

    name: str
    manifest: Manifest | LiveDataset
    weight: float
    producer: ProducerProcess | None = None


@dataclass(frozen=True)
class Dataset:
    """The parts of the training data, of one tokenizer; a single one unless they are mixed."""

    parts: tuple[Part, ...]

    @classmethod
    def open(
        cls,
        config: DataConfig,
        prepared: Mapping[str, Manifest],
        producers: Mapping[str, ProducerProcess],
        made: Collection[str],
        verify: str,
    ) -> "Dataset":
        """The data of a run. Raises UserError.

        prepared: what `open_prepared` gave. producers: on rank 0, those of the streamed data sets, whose
        heads must be there. made: names of those that have been made already: read like prepared ones.
        """
        parts = []
        for part in config.parts:
            weight = part.weight or 0.0
            if part.stream is None:
                manifest = prepared[part.label]
                if part.epochs is not None:
                    weight = manifest.totals("train").tokens * part.epochs
                if not weight:
                    raise UserError(f"{part.path}: has no training tokens to make epochs of")
                parts.append(Part(part.label, manifest, weight))
            elif part.label in made:
                parts.append(Part(part.label, _manifest(part.path, verify), weight))
            else:
                producer = producers.get(part.label)
                live = LiveDataset(Path(part.path), producer.need if producer else _needs_nothing)
                parts.append(Part(part.label, live, weight, producer))
        return cls(tuple(parts))

    @property
    def live(self) -> list[Part]:
        """The parts that are still being made."""
        return [part for part in self.parts if not part.manifest.complete]

    def settled(self, names: Collection[str]) -> "Dataset":
        """The data, these parts as they are when they have been made.

        Raises UserError for files that are not whole.
        """
        parts = [
            Part(part.name, load_manifest(part.manifest.folder, "size"), part.weight)
            if part.name in names
            else part
            for part in self.parts
        ]
        return Dataset(tuple(parts))

    @property
    def mixed(self) -> bool:
        """Whether there are several parts."""
        return len(self.parts) > 1

    @property
    def tokenizer(self) -> TokenizerInfo:
        """Facts of the tokenizer that all parts share."""
        return self.parts[0].manifest.tokenizer

    @property
    def tokenizer_folder(self) -> Path:
        """Where `load_tokenizer` finds it."""
        return self.parts[0].manifest.tokenizer_folder

    @property
    def sha256(self) -> str:
        """Identifies the data: the manifest's digest, or one over the parts' digests and weights."""
        if not self.mixed:
            return self.parts[0].manifest.sha256
        described = [[part.name, part.manifest.sha256, part.weight] for part in self.parts]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    @property
    def folders(self) -> str:
        """Where the data are, for people."""
        return ", ".join(str(part.manifest.folder) for part in self.parts)

    def totals(self, split: str) -> Totals:
        """Sums over the parts of a split."""
        return total([part.manifest.totals(split) for part in self.parts])

    def shares(self, split: str) -> list[tuple[Part, float]]:
        """The parts that have tokens in a split, and the share of the training tokens that each makes."""
        there = [part for part in self.parts if part.manifest.totals(split).tokens]
        whole = sum(part.weight for part in there)
        return [(part, part.weight / whole) for part in there]

    def stream(self, config: DataConfig, context_length: int) -> TokenStream | Blend:
        """The training samples in order. Raises UserError."""
        streams = [
            TokenStream(part.manifest, "train", context_length, config.seed, config.shuffle_window)
            for part in self.parts
        ]
        if not config.sources:
            return streams[0]
        return Blend(
            [
                Ingredient(part.name, stream, part.weight)
                for part, stream in zip(self.parts, streams, strict=True)
            ]
        )


def open_prepared(config: DataConfig, verify: str) -> dict[str, Manifest]:
    """The manifests, by name, of the data sets that were prepared before; their files are checked.

    verify: `full` compares checksums, anything else sizes. Raises UserError.
    """
    return {part.label: _manifest(part.path, verify) for part in config.parts if part.stream is None}


def _manifest(location: str, verify: str) -> Manifest:
    mode: Literal["full", "size"] = "full" if verify == "full" else "size"
    if "://" in location:
        from spikescale.data_pipeline.remote import localise

        # What comes from afar is compared with its checksums when it is fetched, and as asked for later.
        return load_manifest(localise(location, mode, quiet=False), "size")
    return load_manifest(Path(location), mode)


def _needs_nothing(first: int, stop: int) -> None:
    """Other ranks than 0 have nobody to ask for shards."""
