"""Splits by position: the beginning of a text for training, then valid, then test, as is usual for enwik8.

The text is that of all partitions in their order, in UTF-8 bytes. A document in which a split ends is cut
there, at the next character. What is cut stays a pure function of the source and the fractions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from spikescale.data_pipeline.pools import SerialPool
from spikescale.data_pipeline.progress import Progress
from spikescale.data_pipeline.sources import Partition
from spikescale.data_pipeline.sources.base import Document, WrappedPartition
from spikescale.data_pipeline.split import SPLITS, SplitSettings
from spikescale.errors import UserError


@dataclass(frozen=True)
class PositionPart(WrappedPartition):
    """The text at bytes [begin, end) of what a partition holds, all of one split; end None: to its end."""

    begin: int
    end: int | None
    place: str

    @property
    def label(self) -> str:
        """The partition's, with the bytes and the split."""
        end = "" if self.end is None else self.end
        return f"{self.inner.label} bytes {self.begin}:{end} ({self.place})"

    @property
    def split(self) -> str | None:
        """Where the position says."""
        return self.place

    def documents(self) -> Iterator[Document]:
        """The documents between the two positions; one that a position lies in is cut there."""
        offset = 0
        for document in self.inner.documents():
            if self.end is not None and offset >= self.end:
                return
            if document.fault:
                if offset >= self.begin:
                    yield document
                continue
            encoded = _encoded(document.text)
            stop = len(encoded) if self.end is None else min(self.end - offset, len(encoded))
            first = max(self.begin - offset, 0)
            offset += len(encoded)
            if first == 0 and stop == len(encoded):
                yield document
            elif first < len(encoded):
                piece = encoded[_boundary(encoded, first) : _boundary(encoded, stop)]
                yield document._replace(text=piece.decode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class MeasureTask:
    """How many bytes of text a partition holds."""

    partition: Partition

    def run(self, report: Callable[[int, int, int], None]) -> int:
        """Read the partition."""
        total = 0
        for document in self.partition.documents():
            size = 0 if document.fault else len(_encoded(document.text))
            total += size
            report(1, 0, size)
        return total


def split_by_position(
    partitions: Sequence[Partition], settings: SplitSettings, progress: Progress
) -> list[Partition]:
    """Partitions that each belong to one split: those given, cut where valid and where test begin.

    Reads everything once, to know how much there is. Raises UserError for a source with splits of its own.
    """
    for partition in partitions:
        if partition.split is not None:
            raise UserError(
                f"--split-by position: {partition.label} has splits of its own, which are kept; leave it out"
            )
    sizes = list(SerialPool().run([MeasureTask(partition) for partition in partitions], progress))
    total = sum(sizes)
    held_out = settings.valid_fraction + settings.test_fraction
    begins = (0, round(total * (1 - held_out)), round(total * (1 - settings.test_fraction)), total)
    parts: list[Partition] = []
    start = 0
    for partition, size in zip(partitions, sizes, strict=True):
        for split, low, high in zip(SPLITS, begins, begins[1:], strict=False):
            begin, end = max(low - start, 0), min(high - start, size)
            if begin < end:
                parts.append(PositionPart(partition, begin, None if end == size else end, split))
        if size == 0:  # it may hold bad records, which somebody must come across
            parts.append(PositionPart(partition, 0, None, "train"))
        start += size
    return parts


def _encoded(text: str) -> bytes:
    # A lone surrogate is refused where documents are placed, with its place.
    return text.encode("utf-8", "surrogatepass")


def _boundary(encoded: bytes, position: int) -> int:
    """The first byte from `position` on that begins a character."""
    while position < len(encoded) and encoded[position] & 0xC0 == 0x80:
        position += 1
    return position
