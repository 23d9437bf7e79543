"""What a run trains on: one prepared data set, or a mixture of several."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spikescale.config import DataConfig
from spikescale.data_pipeline.blend import Blend, Ingredient
from spikescale.data_pipeline.manifest import Manifest, TokenizerInfo, Totals, load_manifest
from spikescale.data_pipeline.stream import TokenStream
from spikescale.errors import UserError


@dataclass(frozen=True)
class Part:
    """One prepared data set. `weight`: its share of the tokens, relative to the other parts' weights."""

    name: str
    manifest: Manifest
    weight: float


@dataclass(frozen=True)
class Dataset:
    """The parts of the training data, of one tokenizer; a single one unless they are mixed."""

    parts: tuple[Part, ...]

    @classmethod
    def open(cls, config: DataConfig, verify: str) -> "Dataset":
        """Read the manifests and check their files. Raises UserError."""
        if config.path is not None:
            return cls((Part(config.path.name, load_manifest(config.path, _mode(verify)), 1.0),))
        parts = []
        for source in config.sources:
            manifest = load_manifest(source.path, _mode(verify))
            tokens = manifest.totals("train").tokens
            weight = tokens * source.epochs if source.epochs else float(source.weight or 0)
            if not weight:
                raise UserError(f"{source.path}: has no training tokens to make epochs of")
            parts.append(Part(source.label, manifest, weight))
        return cls(tuple(parts))

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
        totals = [part.manifest.totals(split) for part in self.parts]
        return Totals(
            tokens=sum(total.tokens for total in totals),
            documents=sum(total.documents for total in totals),
            bytes=sum(total.bytes for total in totals),
            characters=sum(total.characters for total in totals),
        )

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


def _mode(verify: str) -> Literal["full", "size"]:
    return "full" if verify == "full" else "size"
