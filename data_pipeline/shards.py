"""Shards: megatron-core's .bin/.idx pair with a JSON sidecar that appears last.

`<split>-<number>.bin` holds token ids back to back, each document ended by the end-of-document id;
`.idx` the documents' lengths; `.json` the counts and checksums. A shard exists when its sidecar does.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from spikescale.errors import UserError
from spikescale.files import fsync_file, fsync_folder, read_json, sha256_file, temporary_path, write_json

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER_BYTES = 34  # magic 9, version 8, dtype code 1, sequence count 8, document count 8


@dataclass(frozen=True)
class ShardInfo:
    """One shard.

    Attributes:
        number: of the partition it was made from; split: train, valid or test.
        path: of the .bin file (absent when `tokens` is 0).
        tokens: token ids, the end of each document included; documents: how many.
        bytes, characters: of the documents' text (UTF-8 bytes; Unicode code points).
        max_id: the largest token id.
        bin_sha256, idx_sha256: checksums of the two files ("" when absent).
    """

    number: int
    split: str
    path: Path
    tokens: int
    documents: int
    bytes: int
    characters: int
    max_id: int
    bin_sha256: str
    idx_sha256: str

    @property
    def index_path(self) -> Path:
        """The .idx file."""
        return self.path.with_suffix(".idx")

    @property
    def sha256(self) -> str:
        """The checksum of the token file."""
        return self.bin_sha256

    def to_json(self) -> dict[str, Any]:
        """All but the folder, as plain JSON."""
        return {**asdict(self), "path": self.path.name}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], folder: Path) -> "ShardInfo":
        """The inverse of `to_json`; other keys are passed over. Raises KeyError when one is missing."""
        values = {field.name: content[field.name] for field in fields(cls)}
        return cls(**{**values, "path": folder / Path(values["path"]).name})


def shard_path(folder: Path, split: str, number: int) -> Path:
    """The .bin path of a shard."""
    return folder / f"{split}-{number:05d}.bin"


def dtype_for(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else int32. Raises UserError beyond 2^31."""
    if vocab_size <= 1 << 16:
        return np.dtype(np.uint16)
    if vocab_size <= 1 << 31:
        return np.dtype(np.int32)
    raise UserError(f"vocabulary of {vocab_size} ids: ids above 2^31 - 1 do not fit a shard")


def check_ids(ids: np.ndarray, vocab_size: int, dtype: np.dtype, place: str) -> int:
    """The largest id. Raises UserError when one is negative, outside the vocabulary, or does not fit `dtype`.

    Casting would wrap such an id silently into another token.
    """
    if not len(ids):
        return 0
    low, high = int(ids.min()), int(ids.max())
    limit = min(vocab_size, int(np.iinfo(dtype).max) + 1)
    if low < 0 or high >= limit:
        wrong = low if low < 0 else high
        raise UserError(
            f"{place}: token id {wrong} is outside 0..{limit - 1} (vocabulary {vocab_size}, {dtype})"
        )
    return high


class ShardWriter:
    """Writes one split of one partition. The files get their names in `finish`; `abandon` removes them.

    Args:
        folder, split, number: say which shard.
        vocab_size, eos_id: of the tokenizer.
    """

    def __init__(self, folder: Path, split: str, number: int, vocab_size: int, eos_id: int) -> None:
        self.path = shard_path(folder, split, number)
        self.split = split
        self.number = number
        self.tokens = self.documents = self.bytes = self.characters = self.max_id = 0
        self._vocab_size = vocab_size
        self._eos = eos_id
        self._dtype = dtype_for(vocab_size)
        self._temporaries = (temporary_path(self.path), temporary_path(self.path.with_suffix(".idx")))
        self._digest = hashlib.sha256()  # of what was written, which reading is held to
        self._builder: Any = None

    def add(self, ids: np.ndarray, size_bytes: int, characters: int, place: str) -> None:
        """Append a document: its ids without the end-of-document id, and the size of its text."""
        self.add_all([ids], size_bytes, characters, [place])

    def add_all(
        self, documents: Sequence[np.ndarray], size_bytes: int, characters: int, places: Sequence[str]
    ) -> None:
        """Append documents: ids of each without the end-of-document id, the size of all texts, their places.

        Many at once cost a fifth of one by one.
        """
        if not len(documents):
            return
        # Of a type that widens none of the tokenizers' own: every pass over the ids then costs what it must.
        end = np.array([self._eos], dtype=np.uint32)
        parts = [end] * (2 * len(documents))
        parts[::2] = documents
        wide = np.concatenate(parts)
        limit = min(self._vocab_size, int(np.iinfo(self._dtype).max) + 1)
        high, low = int(wide.max()), 0 if wide.dtype.kind == "u" else int(wide.min())
        ids = wide.astype(self._dtype, copy=False)
        if low < 0 or high >= limit or int(np.count_nonzero(ids == self._eos)) != len(documents):
            self._complain(documents, places)
        if self._builder is None:
            self._builder = _indexed_dataset_builder(self._temporaries[0], self._dtype)
        builder = self._builder
        builder.data_file.write(ids.data)
        self._digest.update(ids.data)
        first = len(builder.sequence_lengths)
        builder.sequence_lengths.extend([len(document) + 1 for document in documents])
        builder.document_indices.extend(range(first + 1, first + len(documents) + 1))
        self.max_id = max(self.max_id, high)
        self.tokens += len(ids)
        self.documents += len(documents)
        self.bytes += size_bytes
        self.characters += characters

    def _complain(self, documents: Sequence[np.ndarray], places: Sequence[str]) -> None:
        for ids, place in zip(documents, places, strict=True):
            check_ids(ids, self._vocab_size, self._dtype, place)
            if len(ids) and bool((ids == self._eos).any()):
                raise UserError(
                    f"{place}: the text itself gives the end-of-document id {self._eos}; clean it first"
                )
        raise AssertionError("ids that are wrong together are wrong one by one")

    def finish(self, **facts: Any) -> ShardInfo:
        """Complete the files, rename them into place, and write the sidecar, with `facts`, last."""
        sums = ["", ""]
        if self._builder is not None:
            self._builder.finalize(str(self._temporaries[1]))
            sums = [self._digest.hexdigest(), sha256_file(self._temporaries[1])]
            for temporary in self._temporaries:
                fsync_file(temporary)
            for temporary, path in zip(
                self._temporaries, (self.path, self.path.with_suffix(".idx")), strict=True
            ):
                temporary.replace(path)
            fsync_folder(self.path.parent)
        else:
            # Left by an earlier, different preparation.
            self.path.unlink(missing_ok=True)
            self.path.with_suffix(".idx").unlink(missing_ok=True)
        info = ShardInfo(
            number=self.number,
            split=self.split,
            path=self.path,
            tokens=self.tokens,
            documents=self.documents,
            bytes=self.bytes,
            characters=self.characters,
            max_id=self.max_id,
            bin_sha256=sums[0],
            idx_sha256=sums[1],
        )
        write_json(self.path.with_suffix(".json"), {**info.to_json(), **facts})
        return info

    def abandon(self) -> None:
        """Remove the unfinished files."""
        for temporary in self._temporaries:
            temporary.unlink(missing_ok=True)


def _indexed_dataset_builder(path: Path, dtype: np.dtype) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional GPU libraries that writing does not need
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    return IndexedDatasetBuilder(str(path), dtype=dtype.type)


def finished_shard(folder: Path, split: str, number: int, facts: Mapping[str, Any]) -> ShardInfo | None:
    """The shard if it was written with the same `facts` and its files are intact, else None."""
    sidecar = shard_path(folder, split, number).with_suffix(".json")
    if not sidecar.exists():
        return None
    try:
        content = read_json(sidecar)
        info = ShardInfo.from_json(content, folder)
    except (UserError, KeyError, TypeError):
        return None
    if any(content.get(name) != value for name, value in facts.items()):
        return None
    if info.tokens:
        for path, expected in ((info.path, info.bin_sha256), (info.index_path, info.idx_sha256)):
            if not path.exists() or sha256_file(path) != expected:
                return None
    return info


def document_lengths(shard: ShardInfo) -> np.ndarray:
    """Tokens of each document of a shard, int64, read from its .idx. Raises UserError when damaged."""
    if shard.tokens == 0:
        return np.zeros(0, dtype=np.int64)
    path = shard.index_path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if content[:9] != INDEX_MAGIC or len(content) < INDEX_HEADER_BYTES:
        raise UserError(f"{path}: not an index of a megatron-core IndexedDataset")
    sequences, boundaries = np.frombuffer(content, dtype="<u8", count=2, offset=18).tolist()
    expected = INDEX_HEADER_BYTES + 12 * sequences + 8 * boundaries
    if len(content) != expected:
        raise UserError(f"{path}: truncated: {len(content)} bytes, its header announces {expected}")
    lengths = np.frombuffer(content, dtype="<i4", count=sequences, offset=INDEX_HEADER_BYTES).astype(np.int64)
    offset = INDEX_HEADER_BYTES + 12 * sequences
    documents = np.frombuffer(content, dtype="<i8", count=boundaries, offset=offset)
    ends = np.concatenate([[0], np.cumsum(lengths)])[documents]
    return np.diff(ends)
