"""Which split a document belongs to, and cutting long documents before that is decided."""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from spikescale.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class SplitSettings:
    """How text is divided.

    Attributes:
        valid_fraction, test_fraction: shares of the documents (by hash) or of the bytes (by position); the
            rest is for training.
        unit: `document`, or `chunk`: documents are first cut, at paragraph or line ends where there
            are any, into pieces of at most `chunk_characters`, and each piece is placed by itself.
        by: `hash` of each document, or `position`: the beginning of the text is for training, then comes
            valid, the end is test; None: as the source says, else by hash.
    """

    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    unit: str = "document"
    chunk_characters: int = 4000
    by: str | None = None

    def __post_init__(self) -> None:
        for name in ("valid_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 0 and below 1")
        if self.valid_fraction + self.test_fraction >= 1:
            total = self.valid_fraction + self.test_fraction
            raise UserError(
                f"valid_fraction + test_fraction = {total:g}: must be below 1, the rest is for training"
            )
        if self.unit not in ("document", "chunk"):
            raise UserError(f"split unit {self.unit!r}: must be document or chunk")
        if self.by not in (None, "hash", "position"):
            raise UserError(f"split by {self.by!r}: must be hash or position")
        if self.chunk_characters < 1:
            raise UserError(f"chunk_characters = {self.chunk_characters}: must be positive")

    def described(self) -> dict[str, Any]:
        """The settings as plain JSON; what is newer only where it is not the default."""
        described = asdict(self)
        if self.by != "position":
            del described["by"]
        return described

    def expects(self, split: str) -> bool:
        """Whether documents without a split of their own are to reach this one."""
        return split == "train" or getattr(self, f"{split}_fraction") > 0


def split_of(digest: bytes, settings: SplitSettings) -> str:
    """The split of a document with this SHA-256: a pure function, so exact duplicates stay together."""
    return side(digest, *bounds(settings))


def side(digest: bytes, test: bytes, valid: bytes) -> str:
    """As `split_of`, with the `bounds` of the settings."""
    return "train" if digest >= valid else "valid" if digest >= test else "test"


@functools.lru_cache
def bounds(settings: SplitSettings) -> tuple[bytes, bytes]:
    """Where validation and where training begin among digests, whose first 8 bytes are a number in [0, 1)."""

    def first_at_least(fraction: float) -> bytes:
        low, high = 0, 2**64
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if middle / 2**64 >= fraction else (middle + 1, high)
        return low.to_bytes(8, "big")

    test = settings.test_fraction
    return first_at_least(test), first_at_least(test + settings.valid_fraction)


def chunks(text: str, size: int) -> Iterator[str]:
    """Cut `text` into consecutive pieces of at most `size` characters that together are the text.

    A cut falls after the last blank line, else line end, else space, of the second half of a piece.
    """
    begin = 0
    while len(text) - begin > size:
        end = begin + size
        for separator in ("\n\n", "\n", " "):
            found = text.rfind(separator, begin + size // 2, end)
            if found >= 0:
                end = min(end, found + len(separator))
                break
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]
