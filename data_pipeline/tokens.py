"""Tokens of a split in the order of its shards: for exact evaluation, statistics and inspection."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.shards import ShardInfo, document_lengths
from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.data_pipeline.live import LiveDataset


def open_tokens(shard: ShardInfo, dtype: np.dtype) -> np.memmap:
    """A shard's token ids as a read-only memory map. Raises UserError when it is missing or has another size.

    Copy what is to outlive the map.
    """
    try:
        tokens = np.memmap(shard.path, dtype=dtype, mode="r")
        if tokens.shape != (shard.tokens,):
            raise ValueError("not what the manifest says")
        return tokens
    except (OSError, ValueError) as error:
        size = Path(shard.path).stat().st_size if Path(shard.path).exists() else 0
        raise UserError(
            f"{shard.path}: cannot be read as {shard.tokens} {dtype} tokens: it has {size} bytes ({error})"
        ) from None


class SplitTokens:
    """A split as one sequence of token ids, over its shards in number order."""

    def __init__(self, manifest: "Manifest | LiveDataset", split: str) -> None:
        self._dtype = manifest.dtype
        self._shards = manifest.shards(split)
        self._ends = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, key: slice) -> np.ndarray:
        """The ids of a slice with step 1, int64, a copy."""
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}: only slices of step 1")
        parts = [np.zeros(0, dtype=np.int64)]
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            shard = self._shards[number]
            first = int(self._ends[number]) - shard.tokens
            end = min(stop, int(self._ends[number]))
            parts.append(open_tokens(shard, self._dtype)[start - first : end - first].astype(np.int64))
            start = end
        return np.concatenate(parts)


def split_tokens(manifest: "Manifest | LiveDataset", split: str) -> SplitTokens:
    """One contiguous sequence over the split's shards in number order, with `len()` and slicing."""
    return SplitTokens(manifest, split)


def iterate_documents(manifest: Manifest, split: str) -> Iterator[np.ndarray]:
    """The token ids of each document, its end-of-document id included, int64."""
    for shard in manifest.shards(split):
        tokens = open_tokens(shard, manifest.dtype)
        lengths = document_lengths(shard)
        if int(lengths.sum()) != shard.tokens:
            raise UserError(
                f"{shard.index_path}: its documents have {int(lengths.sum())} tokens, "
                f"{shard.path.name} has {shard.tokens}"
            )
        begin = 0
        for length in lengths.tolist():
            yield tokens[begin : begin + length].astype(np.int64)
            begin += length
