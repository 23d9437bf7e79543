"""What a run trains on: one prepared data set, or a mixture of several."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from spikescale.config import DataConfig, RunConfig
from spikescale.data_pipeline.blend import Blend, Ingredient
from spikescale.data_pipeline.clean import CleanSettings
from spikescale.data_pipeline.feeder import ProducerProcess
from spikescale.data_pipeline.live import LiveDataset
from spikescale.data_pipeline.manifest import Manifest, TokenizerInfo, Totals, load_manifest, total
from spikescale.data_pipeline.producer import ProducerJob, clean_settings
from spikescale.data_pipeline.sources.base import chosen_options
from spikescale.data_pipeline.stream import TokenStream
from spikescale.errors import UserError


@dataclass(frozen=True)
class Part:
    """One prepared data set. `weight`: its share of the tokens, relative to the other parts' weights."""

    name: str
    manifest: Manifest | LiveDataset
    weight: float


@dataclass(frozen=True)
class Dataset:
    """The parts of the training data, of one tokenizer; a single one unless they are mixed."""

    parts: tuple[Part, ...]
    producer: ProducerProcess | None = None  # on rank 0, while the data are being made

    @classmethod
    def open(
        cls, config: DataConfig, verify: str, made: bool = True, producer: ProducerProcess | None = None
    ) -> "Dataset":
        """Read the manifests and check their files. Raises UserError.

        made: False while the data are being made; their head must be there. producer: on rank 0, who does.
        """
        if config.path is not None and not made:
            needs = producer.need if producer else lambda first, stop: None
            live = LiveDataset(Path(config.path), needs)
            return cls((Part(live.folder.name, live, 1.0),), producer)
        if config.path is not None:
            return cls((Part(Path(config.path).name, _manifest(config.path, verify), 1.0),))
        parts = []
        for source in config.sources:
            manifest = _manifest(source.path, verify)
            tokens = manifest.totals("train").tokens
            weight = tokens * source.epochs if source.epochs else float(source.weight or 0)
            if not weight:
                raise UserError(f"{source.path}: has no training tokens to make epochs of")
            parts.append(Part(source.label, manifest, weight))
        return cls(tuple(parts))

    @property
    def live(self) -> bool:
        """Whether the data are still being made."""
        return not self.parts[0].manifest.complete

    def settled(self) -> "Dataset":
        """The data as they are when they have been made. Raises UserError for files that are not whole."""
        parts = [replace(part, manifest=load_manifest(part.manifest.folder, "size")) for part in self.parts]
        return replace(self, parts=tuple(parts))

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


def _manifest(location: str, verify: str) -> Manifest:
    mode: Literal["full", "size"] = "full" if verify == "full" else "size"
    if "://" in location:
        from spikescale.data_pipeline.remote import localise

        # What comes from afar is compared with its checksums when it is fetched, and as asked for later.
        return load_manifest(localise(location, mode, quiet=False), "size")
    return load_manifest(Path(location), mode)


def producer_job(config: RunConfig) -> ProducerJob:
    """What `data.stream` asks for, with the order in which this run reads it."""
    data, stream = config.data, config.data.stream
    assert stream is not None and data.path is not None  # the schema says so
    folder = Path(data.path).absolute()
    names = ("text_key", "split_on", "format", "encoding")
    plain = {name: getattr(stream, name) for name in names}
    options = chosen_options(stream.bad_records, stream.condition_on, stream.partition_mib, None, **plain)
    split = {"valid_fraction": stream.valid_fraction, "test_fraction": stream.test_fraction}
    return ProducerJob(
        output=str(folder),
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
            "clean": _cleaning(stream.clean),
            "tokenizer_sample_characters": int(stream.tokenizer_sample_mchars * 1_000_000),
            "workers": 1 if stream.ray == "none" else stream.workers,
            "ray": stream.ray != "none",
            "ray_address": stream.ray_address,
        },
        seed=data.seed,
        shuffle_window=data.shuffle_window,
        valid_tokens=config.train.evaluate_tokens,
        ahead_shards=stream.look_ahead_shards,
        ahead_bytes=stream.look_ahead_mib << 20,
    )


def _cleaning(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of cleaning, checked here so that a mistake is told before anything starts."""
    known = sorted(field.name for field in fields(CleanSettings))
    for name in given:
        if name not in known:
            raise UserError(f"data.stream.clean: unknown key {name}; allowed here: {', '.join(known)}")
    return asdict(clean_settings(given))
