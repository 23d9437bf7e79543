"""The manifest: what a folder of prepared data holds, with checksums. Its presence means: complete."""

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spikescale.data_pipeline.index import HEADER
from spikescale.data_pipeline.shards import ShardInfo
from spikescale.data_pipeline.split import SPLITS
from spikescale.data_pipeline.tokenizers import Tokenizer, stored_fingerprint
from spikescale.errors import UserError
from spikescale.files import read_json, sha256_file, write_json

FILE = "manifest.json"
REQUEST = "request.json"
TOKENIZER_FOLDER = "tokenizer"
VERSION = 1
HINT = "run `spikescale data prepare --output {folder}` first"


@dataclass(frozen=True)
class TokenizerInfo:
    """The facts of the tokenizer that made the shards."""

    kind: str
    vocab_size: int
    eos_id: int
    sha256: str


@dataclass(frozen=True)
class Totals:
    """Sums over a split; `bytes` and `characters` are of the text, `tokens` include ends of documents."""

    tokens: int
    documents: int
    bytes: int
    characters: int


@dataclass(frozen=True)
class Manifest:
    """A folder of prepared data.

    Attributes:
        folder: where it is.
        sha256: identifies the data set: a digest of the shards' checksums and the tokenizer's,
            whatever folder it is in.
        dtype: of the token files.
        tokenizer: facts of the tokenizer saved in `tokenizer_folder`.
        splits: for train, valid and test, the shards that hold tokens, in number order.
        partitions: how many partitions there were; shard numbers are below it.
        source: the source's name.
        requests: digest of the request that it was made for, and of those that it was extended from, with
            their numbers of partitions.
    """

    folder: Path
    sha256: str
    dtype: np.dtype
    tokenizer: TokenizerInfo
    splits: dict[str, list[ShardInfo]]
    partitions: int
    source: str
    requests: tuple[tuple[str, int], ...] = ()

    complete = True  # unlike a `LiveDataset`

    @property
    def tokenizer_folder(self) -> Path:
        """Where `load_tokenizer` finds the tokenizer."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def max_id(self) -> int:
        """The largest token id in any shard."""
        return max((shard.max_id for shards in self.splits.values() for shard in shards), default=0)

    def totals(self, split: str) -> Totals:
        """Sums over the shards of a split."""
        return total(self.shards(split))

    def shards(self, split: str) -> list[ShardInfo]:
        """The shards of a split. Raises UserError for a split that is unknown."""
        if split not in self.splits:
            raise UserError(f"split {split!r}: must be one of {', '.join(self.splits)}")
        return self.splits[split]

    def shards_between(self, split: str, first: int, stop: int) -> list[ShardInfo]:
        """The shards of a split that hold tokens, with numbers in [first, stop)."""
        shards = self.shards(split)
        low, high = (
            bisect.bisect_left(shards, number, key=lambda shard: shard.number) for number in (first, stop)
        )
        return shards[low:high]

    def prefix_identity(self, partitions: int) -> str:
        """The digest that the data set would have with its first `partitions` partitions alone."""
        if partitions == self.partitions:
            return self.sha256
        described = {
            "version": VERSION,
            "dtype": self.dtype.name,
            "tokenizer": asdict(self.tokenizer),
            "partitions": partitions,
            "splits": {
                split: [shard.to_json() for shard in shards if shard.number < partitions]
                for split, shards in self.splits.items()
            },
        }
        return content_hash(described)

    def has_prefix(self, identity: str, partitions: int) -> bool:
        """Whether its first `partitions` partitions are the data set with this identity, finished or live."""
        live = {live_identity(request): count for request, count in self.requests}
        if identity in live:
            return live[identity] == partitions
        return self.prefix_identity(partitions) == identity

    def interrupt(self, on: bool) -> None:
        """Nothing waits for a data set that is complete."""


def total(parts: Sequence[ShardInfo | Totals]) -> Totals:
    """Sums over shards, or over sums."""
    return Totals(
        tokens=sum(part.tokens for part in parts),
        documents=sum(part.documents for part in parts),
        bytes=sum(part.bytes for part in parts),
        characters=sum(part.characters for part in parts),
    )


def live_identity(request: str) -> str:
    """How a data set that is still being made is known: by the digest of its request."""
    return f"request:{request}"


def write_manifest(
    folder: Path,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    shards: Sequence[ShardInfo],
    partitions: int,
    source: str,
) -> None:
    """Write the manifest of a finished preparation; the last file that it writes."""
    described = {
        "version": VERSION,
        "dtype": dtype.name,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "sha256": tokenizer.sha256,
        },
        "partitions": partitions,
        "source": source,
        "splits": {
            split: [
                shard.to_json()
                for shard in sorted(shards, key=lambda shard: shard.number)
                if shard.split == split and shard.tokens
            ]
            for split in SPLITS
        },
    }
    write_json(folder / FILE, {**described, "sha256": content_hash(described)})


def content_hash(described: Mapping[str, Any]) -> str:
    """Digest of what decides the tokens and their order; the source's name does not."""
    content = {key: described[key] for key in ("version", "dtype", "tokenizer", "partitions", "splits")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_manifest(folder: Path | str, verify: Literal["full", "size", "none"] = "full") -> Manifest:
    """Read the manifest of prepared data and check the files that it names.

    Args:
        folder: what `spikescale data prepare` wrote.
        verify: `full` computes every checksum, `size` compares lengths, `none` trusts.

    Raises UserError for a folder that is missing, empty or unfinished, an unknown version, a
    truncated or changed file, a tokenizer that is not the one of the manifest, and ids outside its
    vocabulary.
    """
    folder = Path(folder)
    described = _read(folder)
    manifest = _parse(folder, described)
    stored = stored_fingerprint(manifest.tokenizer_folder)
    if stored != manifest.tokenizer.sha256:
        raise UserError(
            f"{manifest.tokenizer_folder}: tokenizer {stored[:12]} is not the one that made the shards, "
            f"{manifest.tokenizer.sha256[:12]} in {FILE}"
        )
    if manifest.max_id >= manifest.tokenizer.vocab_size:
        raise UserError(
            f"{folder / FILE}: the shards hold token id {manifest.max_id}, "
            f"the tokenizer's vocabulary ends at {manifest.tokenizer.vocab_size - 1}"
        )
    shards = [shard for split in manifest.splits.values() for shard in split]
    if verify != "none":
        for shard in shards:
            _check_sizes(shard, manifest.dtype)
    if verify == "full":
        with ThreadPoolExecutor(max_workers=4) as pool:
            for _ in pool.map(_check_sums, shards):
                pass
    return manifest


def _read(folder: Path) -> dict[str, Any]:
    hint = HINT.format(folder=folder)
    if not folder.exists():
        raise UserError(f"{folder}: no such data folder; {hint}")
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a data folder; {hint}")
    path = folder / FILE
    if not path.exists():
        state = (
            "the folder is empty"
            if not any(folder.iterdir())
            else f"holds no {FILE}: not (completely) prepared"
        )
        raise UserError(f"{folder}: {state}; {hint}")
    described = read_json(path)
    version = described.get("version") if isinstance(described, dict) else None
    if version != VERSION:
        raise UserError(
            f"{path}: manifest version {version!r} is unknown; this program reads version {VERSION}"
        )
    return dict(described)


def _parse(folder: Path, described: Mapping[str, Any]) -> Manifest:
    path = folder / FILE
    try:
        if content_hash(described) != described["sha256"]:
            raise UserError(f"{path}: was changed by hand: its content does not match its sha256")
        return Manifest(
            folder=folder,
            sha256=described["sha256"],
            dtype=np.dtype(described["dtype"]),
            tokenizer=TokenizerInfo(**described["tokenizer"]),
            splits={
                split: [ShardInfo.from_json(shard, folder) for shard in described["splits"][split]]
                for split in SPLITS
            },
            partitions=described["partitions"],
            source=described["source"],
            requests=_requests(folder, described["partitions"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged manifest ({error})") from None


def _requests(folder: Path, partitions: int) -> tuple[tuple[str, int], ...]:
    path = folder / REQUEST
    if not path.exists():
        return ()
    request = read_json(path)
    earlier = [(entry["sha256"], entry["partitions"]) for entry in request.get("extends", [])]
    return (*earlier, (request_digest(request), partitions))


def request_digest(request: Mapping[str, Any]) -> str:
    """Digest of what a data set was made for, the content of its `request.json`."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _check_sizes(shard: ShardInfo, dtype: np.dtype) -> None:
    index_bytes = HEADER.size + 12 * shard.documents + 8 * (shard.documents + 1)
    for path, expected in ((shard.path, shard.tokens * dtype.itemsize), (shard.index_path, index_bytes)):
        if not path.exists():
            raise UserError(f"{path}: the shard's file is missing")
        found = path.stat().st_size
        if found != expected:
            kind = "truncated" if found < expected else "too long"
            raise UserError(f"{path}: {kind}: {found} bytes, the manifest says {expected}")


def _check_sums(shard: ShardInfo) -> None:
    for path, expected in ((shard.path, shard.bin_sha256), (shard.index_path, shard.idx_sha256)):
        found = sha256_file(path)
        if found != expected:
            raise UserError(
                f"{path}: checksum differs: sha256 {found[:12]}..., the manifest says {expected[:12]}..."
            )
