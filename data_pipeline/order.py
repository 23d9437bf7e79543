"""The order of an epoch: a seeded permutation of windows of shards, and of the samples in each window.

Shards are cut into samples of T tokens (T + 1 are read, the last being the last target); what is left at a
shard's end is not used. K consecutive shard numbers form a window. The order within a window needs the
sizes of that window's shards alone, and that of the windows only their number: so an epoch can be walked
while later shards are still being made.

Permutations are made by sorting raw PCG64 output, whose bits numpy guarantees for good, unlike those of
`Generator.permutation` (NEP 19).
"""

import functools
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from spikescale.data_pipeline.shards import ShardInfo

_WINDOW_ORDER = 0  # spawn keys that keep the two kinds of permutation apart
_SAMPLE_ORDER = 1


class ShardTable(Protocol):
    """Where an order finds the shards of a data set, finished or growing."""

    def shards_between(self, split: str, first: int, stop: int) -> list[ShardInfo]:
        """The shards of a split that hold tokens, with numbers in [first, stop); may wait for them."""
        ...


@dataclass(frozen=True)
class _Window:
    number: int
    shards: tuple[ShardInfo, ...]
    ends: np.ndarray  # cumulative samples of the shards, int64

    @property
    def samples(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


@dataclass
class _Walk:
    """The windows of one epoch in their order, and how many samples there are up to each, as far as known."""

    order: np.ndarray
    ends: list[int] = field(default_factory=list)


class EpochOrder:
    """Epochs over the shards with numbers below `partitions`.

    Args:
        table: of the shards.
        split: whose.
        partitions: how many shard numbers there are; some may have no tokens in this split.
        context_length: T. seed: of both permutations. shuffle_window: K.
    """

    def __init__(
        self,
        table: ShardTable,
        split: str,
        partitions: int,
        context_length: int,
        seed: int,
        shuffle_window: int,
    ) -> None:
        self.partitions = partitions
        self.windows = -(-partitions // shuffle_window)
        self._table, self._split = table, split
        self._context_length, self._seed, self._width = context_length, seed, shuffle_window
        self._known: dict[int, _Window] = {}
        self._walk = functools.lru_cache(maxsize=2)(self._make_walk)
        self._sample_order = functools.lru_cache(maxsize=4)(self._make_sample_order)
        self._length: int | None = None

    @property
    def known_length(self) -> int | None:
        """Samples of an epoch, or None as long as some window has not been needed."""
        if self._length is None and len(self._known) == self.windows:
            self._length = sum(window.samples for window in self._known.values())
        return self._length

    def length(self) -> int:
        """Samples of an epoch; waits for every shard."""
        for number in range(self.windows):
            self._window(number)
        length = self.known_length
        assert length is not None
        return length

    def empty_windows(self) -> int:
        """How many windows have no sample; waits for every shard."""
        self.length()
        return sum(window.samples == 0 for window in self._known.values())

    def window_order(self, epoch: int) -> list[int]:
        """The numbers of an epoch's windows in the order in which they are read."""
        return [int(number) for number in self._walk(epoch).order]

    def find(self, epoch: int, within: int) -> tuple[ShardInfo, int] | None:
        """The shard of sample `within` of an epoch, and its first token there; None past the epoch's end."""
        walk = self._walk(epoch)
        while not walk.ends or walk.ends[-1] <= within:
            if len(walk.ends) == len(walk.order):
                return None
            window = self._window(int(walk.order[len(walk.ends)]))
            walk.ends.append((walk.ends[-1] if walk.ends else 0) + window.samples)
        place = int(np.searchsorted(walk.ends, within, side="right"))
        window = self._window(int(walk.order[place]))
        order = self._sample_order(epoch, window.number)
        sample = int(order[within - (walk.ends[place - 1] if place else 0)])
        member = int(np.searchsorted(window.ends, sample, side="right"))
        first = int(window.ends[member - 1]) if member else 0
        return window.shards[member], (sample - first) * self._context_length

    def _window(self, number: int) -> _Window:
        if number not in self._known:
            first = number * self._width
            stop = min(first + self._width, self.partitions)
            found = self._table.shards_between(self._split, first, stop)
            members = tuple(shard for shard in found if shard.tokens > self._context_length)
            counts = [(shard.tokens - 1) // self._context_length for shard in members]
            self._known[number] = _Window(number, members, np.cumsum(counts, dtype=np.int64))
        return self._known[number]

    def _make_walk(self, epoch: int) -> _Walk:
        return _Walk(permutation(self.windows, self._seed, epoch, _WINDOW_ORDER))

    def _make_sample_order(self, epoch: int, number: int) -> np.ndarray:
        return permutation(self._window(number).samples, self._seed, epoch, _SAMPLE_ORDER, number)


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) that depends on the key alone, int64."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")
