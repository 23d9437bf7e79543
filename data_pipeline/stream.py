"""The order in which training reads tokens: a pure function of (manifest, seed, index).

Shards are cut into samples of T tokens (T + 1 are read, the last being the last target); what is
left at a shard's end is not used. K consecutive shard numbers form a window. An epoch is a seeded
permutation of the windows, with a seeded permutation of the samples inside each. The order within a
window needs the sizes of that window's shards alone, so that windows can be read while later shards
are still being made.

Permutations are made by sorting raw PCG64 output, whose bits numpy guarantees for good, unlike
those of `Generator.permutation` (NEP 19).
"""

import functools
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

from spikescale.data_pipeline.loader import Loader
from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.shards import ShardInfo
from spikescale.data_pipeline.tokens import iterate_documents, open_tokens, split_tokens
from spikescale.errors import UserError

__all__ = ["Loader", "TokenStream", "iterate_documents", "split_tokens"]

OPEN_MAPS = 64
_WINDOW_ORDER = 0  # spawn keys that keep the two kinds of permutation apart
_SAMPLE_ORDER = 1


@dataclass(frozen=True)
class _Window:
    number: int
    shards: tuple[ShardInfo, ...]
    ends: np.ndarray  # cumulative samples of the shards, int64

    @property
    def samples(self) -> int:
        return int(self.ends[-1])


class TokenStream:
    """Endless samples of a split in seeded order.

    Args:
        manifest: of the prepared data.
        split: train, valid or test.
        context_length: T, tokens of input in a sample.
        seed: of the order.
        shuffle_window: K, shards whose samples are mixed with one another.

    Raises UserError when no shard holds T + 1 tokens.
    """

    def __init__(
        self, manifest: Manifest, split: str, context_length: int, seed: int = 0, shuffle_window: int = 8
    ) -> None:
        for name, value, least in (
            ("context_length", context_length, 1),
            ("shuffle_window", shuffle_window, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UserError(f"{name} = {value}: must be at least {least}")
        self.manifest = manifest
        self.split = split
        self.context_length = context_length
        self.seed = seed
        self.shuffle_window = shuffle_window
        self._windows = self._make_windows(manifest.shards(split))
        self.samples_per_epoch = sum(window.samples for window in self._windows)
        if self.samples_per_epoch == 0:
            longest = max((shard.tokens for shard in manifest.shards(split)), default=0)
            raise UserError(
                f"{manifest.folder}: no {split} sample of context_length {context_length}: it takes "
                f"{context_length + 1} tokens in one shard, the longest has {longest}"
            )
        self._maps: OrderedDict[int, np.memmap] = OrderedDict()
        self._window_order = functools.lru_cache(maxsize=2)(self._make_window_order)
        self._sample_order = functools.lru_cache(maxsize=4)(self._make_sample_order)

    def _make_windows(self, shards: list[ShardInfo]) -> list[_Window]:
        grouped: dict[int, list[ShardInfo]] = {}
        for shard in shards:
            if shard.tokens > self.context_length:
                grouped.setdefault(shard.number // self.shuffle_window, []).append(shard)
        windows = []
        for number, members in sorted(grouped.items()):
            counts = [(shard.tokens - 1) // self.context_length for shard in members]
            windows.append(_Window(number, tuple(members), np.cumsum(counts, dtype=np.int64)))
        return windows

    def _make_window_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows of an epoch in order (positions), and the cumulative samples along it."""
        order = _permutation(len(self._windows), self.seed, epoch, _WINDOW_ORDER)
        return order, np.cumsum([self._windows[position].samples for position in order], dtype=np.int64)

    def _make_sample_order(self, epoch: int, position: int) -> np.ndarray:
        window = self._windows[position]
        return _permutation(window.samples, self.seed, epoch, _SAMPLE_ORDER, window.number)

    def locate(self, index: int) -> tuple[ShardInfo, int]:
        """The shard of sample `index` (from 0, across epochs) and the offset, in tokens, of its start."""
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch, rest = divmod(index, self.samples_per_epoch)
        order, ends = self._window_order(epoch)
        place = int(np.searchsorted(ends, rest, side="right"))
        window = self._windows[order[place]]
        within = rest - (int(ends[place - 1]) if place else 0)
        sample = int(self._sample_order(epoch, int(order[place]))[within])
        member = int(np.searchsorted(window.ends, sample, side="right"))
        first = int(window.ends[member - 1]) if member else 0
        return window.shards[member], (sample - first) * self.context_length

    def sample(self, index: int) -> np.ndarray:
        """Sample `index`: T + 1 token ids, int64; inputs are [:-1], targets [1:]."""
        shard, offset = self.locate(index)
        return self._map(shard)[offset : offset + self.context_length + 1].astype(np.int64)

    def rows(self, start: int, count: int) -> torch.Tensor:
        """Samples start .. start + count - 1 as a (count, T + 1) int64 tensor."""
        rows = np.empty((count, self.context_length + 1), dtype=np.int64)
        for row in range(count):
            shard, offset = self.locate(start + row)
            rows[row] = self._map(shard)[offset : offset + self.context_length + 1]
            # Files are checked when a run starts, which may be weeks ago.
            if int(rows[row].max()) >= self.manifest.tokenizer.vocab_size:
                raise UserError(
                    f"{shard.path}: holds token id {int(rows[row].max())} at token {offset} or after, the"
                    f" vocabulary ends at {self.manifest.tokenizer.vocab_size - 1}: the file was damaged"
                )
        return torch.from_numpy(rows)

    def batch(self, index: int, batch_size: int) -> torch.Tensor:
        """Batch `index` of `batch_size` samples: a (batch_size, T + 1) int64 tensor."""
        return self.rows(index * batch_size, batch_size)

    def _map(self, shard: ShardInfo) -> np.ndarray:
        found = self._maps.get(shard.number)
        if found is None:
            found = open_tokens(shard, self.manifest.dtype)
            self._maps[shard.number] = found
            # Open files and mapped pages stay bounded however many shards there are.
            while len(self._maps) > max(OPEN_MAPS, 2 * self.shuffle_window):
                self._maps.popitem(last=False)
        else:
            self._maps.move_to_end(shard.number)
        return found


def _permutation(count: int, *key: int) -> np.ndarray:
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")
