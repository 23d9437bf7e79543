"""The order in which training reads tokens: a pure function of (data set, seed, index), see `order.py`."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spikescale.data_pipeline.loader import Loader
from spikescale.data_pipeline.order import EpochOrder
from spikescale.data_pipeline.shards import ShardInfo
from spikescale.data_pipeline.tokens import iterate_documents, open_tokens, split_tokens
from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.data_pipeline.live import LiveDataset
    from spikescale.data_pipeline.manifest import Manifest

__all__ = ["Loader", "TokenStream", "iterate_documents", "split_tokens"]

OPEN_MAPS = 64


@dataclass(frozen=True)
class _Span:
    """From sample `start` on, epochs numbered from `epoch` in this order."""

    start: int
    epoch: int
    order: EpochOrder


class TokenStream:
    """Endless samples of a split in seeded order.

    Args:
        manifest: of the prepared data, or a `LiveDataset` that is still being made.
        split: train, valid or test.
        context_length: T, tokens of input in a sample.
        seed: of the order.
        shuffle_window: K, shards whose samples are mixed with one another.

    Raises UserError when no shard holds T + 1 tokens; for a live data set, when all of it is known.
    """

    def __init__(
        self,
        manifest: "Manifest | LiveDataset",
        split: str,
        context_length: int,
        seed: int = 0,
        shuffle_window: int = 8,
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
        self._spans = [_Span(0, 0, self._order(manifest.partitions))]
        self._maps: OrderedDict[int, np.memmap] = OrderedDict()
        if manifest.complete and self.samples_per_epoch == 0:
            self._refuse_empty()

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch over the whole data set; waits for it to be complete."""
        return self._spans[-1].order.length()

    def locate(self, index: int) -> tuple[ShardInfo, int]:
        """The shard of sample `index` (from 0, across epochs) and the offset, in tokens, of its start.

        Waits for shards that are still being made. Raises IndexError before the epoch that a restored
        position lies in.
        """
        if index < self._spans[0].start:
            raise IndexError(f"sample {index}")
        span = max((span for span in self._spans if span.start <= index), key=lambda span: span.start)
        rest = index - span.start
        found = span.order.find(span.epoch, rest)
        if found is None:
            length = span.order.length()
            if length == 0:
                self._refuse_empty()
            epochs, within = divmod(rest, length)
            found = span.order.find(span.epoch + epochs, within)
        assert found is not None
        return found

    def sample(self, index: int) -> np.ndarray:
        """Sample `index`: T + 1 token ids, int64; inputs are [:-1], targets [1:]."""
        shard, offset = self.locate(index)
        return self._map(shard)[offset : offset + self.context_length + 1].astype(np.int64)

    def rows(self, start: int, count: int) -> torch.Tensor:
        """Samples start .. start + count - 1 as a (count, T + 1) int64 tensor."""
        rows = np.empty((count, self.context_length + 1), dtype=np.int64)
        for row in range(count):
            self.read_into(rows[row], start + row)
        return torch.from_numpy(rows)

    def read_into(self, row: np.ndarray, index: int) -> None:
        """Write sample `index` to `row` (T + 1,) int64. Raises UserError for ids outside the vocabulary."""
        shard, offset = self.locate(index)
        row[:] = self._map(shard)[offset : offset + self.context_length + 1]
        # Files are checked when a run starts, which may be weeks ago.
        if int(row.max()) >= self.manifest.tokenizer.vocab_size:
            raise UserError(
                f"{shard.path}: holds token id {int(row.max())} at token {offset} or after, the"
                f" vocabulary ends at {self.manifest.tokenizer.vocab_size - 1}: the file was damaged"
            )

    def sources(self, start: int, count: int) -> None:
        """Nothing to tell apart: see `Blend.sources`."""

    def batch(self, index: int, batch_size: int) -> torch.Tensor:
        """Batch `index` of `batch_size` samples: a (batch_size, T + 1) int64 tensor."""
        return self.rows(index * batch_size, batch_size)

    def position(self, index: int) -> dict[str, Any]:
        """What sample number `index` refers to: the order, the data set, and the epoch it lies in.

        Never waits: where an epoch's end is not known yet, `index` is taken to lie in it, or to be its end.
        """
        span = max((span for span in self._spans if span.start <= index), key=lambda span: span.start)
        epoch, start = span.epoch, span.start
        length = span.order.length() if self.manifest.complete else span.order.known_length
        if length:
            more = (index - start) // length
            epoch, start = epoch + more, start + more * length
        return {
            "manifest": self.manifest.prefix_identity(span.order.partitions),
            "split": self.split,
            "seed": self.seed,
            "context_length": self.context_length,
            "shuffle_window": self.shuffle_window,
            "partitions": span.order.partitions,
            "epoch": epoch,
            "epoch_start": start,
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Number the samples as when the position was taken.

        Where shards were added at the end since, the epoch that was begun goes on without them, and they are
        in every later one. Raises UserError when data or order differ.
        """
        for name in ("split", "seed", "context_length", "shuffle_window"):
            _require_same(name, position.get(name), getattr(self, name))
        whole = self.manifest.partitions
        partitions = int(position.get("partitions", whole))
        earlier = str(position.get("manifest"))
        if partitions > whole or not self.manifest.has_prefix(earlier, partitions):
            _require_same("manifest", earlier, self.manifest.prefix_identity(min(partitions, whole)))
            raise UserError(
                f"cannot continue in the data: there were {partitions} shards and are now {whole}"
            )
        if "partitions" not in position and self._order(whole).empty_windows():
            # Windows without samples took no part in the permutation.
            raise UserError("cannot continue in the data: an earlier version ordered these shards otherwise")
        epoch, start = int(position.get("epoch", 0)), int(position.get("epoch_start", 0))
        begun = _Span(start, epoch, self._order(partitions))
        self._spans = [begun]
        if partitions < whole:
            self._spans.append(_Span(start + begun.order.length(), epoch + 1, self._order(whole)))

    def interrupt(self, on: bool) -> None:
        """Have a reader that waits for shards give up (True), or allow waiting again (False)."""
        self.manifest.interrupt(on)

    def _order(self, partitions: int) -> EpochOrder:
        return EpochOrder(
            self.manifest, self.split, partitions, self.context_length, self.seed, self.shuffle_window
        )

    def _refuse_empty(self) -> None:
        longest = max((shard.tokens for shard in self.manifest.shards(self.split)), default=0)
        raise UserError(
            f"{self.manifest.folder}: no {self.split} sample of context_length {self.context_length}: it "
            f"takes {self.context_length + 1} tokens in one shard, the longest has {longest}"
        )

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


def _require_same(name: str, was: Any, now: Any) -> None:
    if was != now:
        raise UserError(f"cannot continue in the data: {name} was {_short(was)} and is now {_short(now)}")


def _short(value: Any) -> str:
    return repr(value[:12] if isinstance(value, str) else value)
