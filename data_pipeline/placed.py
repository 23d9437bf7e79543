"""Documents that know their split: one by one, or many at once by columns on their way into shards.

A list of tuples a document would do as well as columns, but Python's garbage collector visits each of them
again and again while they are held: a tenth of the whole cost of preparing.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from spikescale.data_pipeline.sources import Document, Partition
from spikescale.data_pipeline.split import SplitSettings, bounds, chunks, side
from spikescale.errors import UserError

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1024


class Placed(NamedTuple):
    """A document that knows its split, and the SHA-256 and length of its UTF-8 encoding.

    `metadata` is the document's, see `sources.base.Document`.
    """

    text: str
    place: str
    split: str
    digest: bytes
    size_bytes: int
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass
class Batch:
    """Documents in their order; each list has one entry for each, see `Placed` for what they are."""

    texts: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    metadata: list[tuple[tuple[str, str], ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def each(self) -> Iterator[Placed]:
        """The documents one by one."""
        return map(Placed._make, zip(*vars(self).values(), strict=True))

    def only(self, chosen: Sequence[bool]) -> "Batch":
        """Those documents for which `chosen` is true."""
        return Batch(*(list(itertools.compress(column, chosen)) for column in vars(self).values()))

    def by_split(self, ids: Sequence[np.ndarray]) -> Iterator[tuple[str, "Batch", Sequence[np.ndarray]]]:
        """(split, its documents, their `ids`) for each split that a document is in."""
        found = dict.fromkeys(self.splits)
        if len(found) == 1:
            yield self.splits[0], self, ids
            return
        for split in found:
            chosen = [other == split for other in self.splits]
            yield split, self.only(chosen), list(itertools.compress(ids, chosen))


def placed_documents(
    partition: Partition, settings: SplitSettings, limit: int | None = None
) -> Iterator[Placed]:
    """The first `limit` documents of a partition, each with its split, one by one: see `placed_batches`."""
    for batch in placed_batches(partition, settings, limit):
        yield from batch.each()


def placed_batches(
    partition: Partition, settings: SplitSettings, limit: int | None = None
) -> Iterator[Batch]:
    """The first `limit` documents of a partition, each with its split. Empty documents are left out.

    Raises UserError for text that cannot be encoded (a lone surrogate, which JSON escapes allow).
    """
    documents: Iterator[Document] = itertools.islice(partition.documents(), limit)
    if settings.unit == "chunk":
        documents = _cut(documents, settings.chunk_characters)
    while batch := _next_batch(documents, partition.split, settings):
        yield batch


def _cut(documents: Iterator[Document], size: int) -> Iterator[Document]:
    for document in documents:
        for text in chunks(document.text, size):
            yield document._replace(text=text)


def _next_batch(documents: Iterator[Document], given: str | None, settings: SplitSettings) -> Batch:
    batch, room = Batch(), BATCH_CHARACTERS
    texts, places, pairs = batch.texts, batch.places, batch.metadata
    for text, place, metadata, _ in documents:
        if not text:
            continue
        texts.append(text)
        places.append(place)
        pairs.append(metadata)
        room -= len(text)
        if room <= 0 or len(texts) >= BATCH_DOCUMENTS:
            break
    encoded = _encoded(texts, places)
    batch.sizes = list(map(len, encoded))
    batch.digests = [digest.digest() for digest in map(hashlib.sha256, encoded)]
    test, valid = bounds(settings)
    batch.splits = [given] * len(texts) if given else [side(digest, test, valid) for digest in batch.digests]
    return batch


def _encoded(texts: Sequence[str], places: Sequence[str]) -> list[bytes]:
    try:
        return list(map(str.encode, texts))
    except UnicodeEncodeError as error:
        place = places[next(number for number, text in enumerate(texts) if text is error.object)]
        code = ord(error.object[error.start])
        raise UserError(f"{place}: not valid Unicode (lone surrogate U+{code:04X})") from None
