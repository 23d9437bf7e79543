"""Many documents on their way into shards at once, by columns.

A list of tuples a document would do as well, but Python's garbage collector visits each of them again and
again while they are held: a tenth of the whole cost of preparing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np

from spikescale.data_pipeline.split import Placed

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1024


@dataclass
class Batch:
    """Documents in their order; each list has one entry for each, see `split.Placed` for what they are."""

    texts: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    metadata: list[tuple[tuple[str, str], ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def following(cls, documents: Iterator[Placed]) -> "Batch":
        """The next documents, so many as make a batch; empty at the end."""
        batch, room = cls(), BATCH_CHARACTERS
        columns = (batch.texts, batch.places, batch.splits, batch.digests, batch.sizes, batch.metadata)
        texts, places, splits, digests, sizes, metadata = columns
        for text, place, split, digest, size_bytes, pairs in documents:
            texts.append(text)
            places.append(place)
            splits.append(split)
            digests.append(digest)
            sizes.append(size_bytes)
            metadata.append(pairs)
            room -= len(text)
            if room <= 0 or len(texts) >= BATCH_DOCUMENTS:
                break
        return batch

    def only(self, chosen: Sequence[bool]) -> "Batch":
        """Those documents for which `chosen` is true."""
        return Batch(*(list(compress(column, chosen)) for column in vars(self).values()))

    def by_split(self, ids: Sequence[np.ndarray]) -> Iterator[tuple[str, "Batch", Sequence[np.ndarray]]]:
        """(split, its documents, their `ids`) for each split that a document is in."""
        found = dict.fromkeys(self.splits)
        if len(found) == 1:
            yield self.splits[0], self, ids
            return
        for split in found:
            chosen = [other == split for other in self.splits]
            yield split, self.only(chosen), list(compress(ids, chosen))
