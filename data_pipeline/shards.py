"""Shards: megatron-core's .bin/.idx pair with a JSON sidecar that appears last.

`<split>-<number>.bin` holds token ids back to back, each document ended by the end-of-document id;
`.idx` the documents' lengths; `.json` the counts and checksums. A shard exists when its sidecar does.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from spikescale.data_pipeline.index import read_index, write_index
from spikescale.errors import UserError
from spikescale.files import fsync_file, fsync_folder, read_json, sha256_file, temporary_path, write_json


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
        self._lengths: list[np.ndarray] = []
        self._file: IO[bytes] | None = None

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
        if self._file is None:
            self._file = self._temporaries[0].open("wb")
        self._file.write(ids.data)
        self._digest.update(ids.data)
        self._lengths.append(np.array([len(document) for document in documents], dtype=np.int64) + 1)
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
        if self._file is not None:
            self._file.close()
            write_index(self._temporaries[1], np.concatenate(self._lengths), self._dtype)
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
        if self._file is not None:
            with contextlib.suppress(OSError):  # of what is still to be written, on a full disk
                self._file.close()
        for temporary in self._temporaries:
            temporary.unlink(missing_ok=True)


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
    return read_index(shard.index_path) if shard.tokens else np.zeros(0, dtype=np.int64)
