"""A limit on the tokens of a document that the tokenizer does not know."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from spikescale.data_pipeline.clean.record import Record
from spikescale.data_pipeline.clean.settings import CleanSettings
from spikescale.data_pipeline.tokenizers import Tokenizer
from spikescale.errors import UserError


@dataclass(frozen=True)
class UnknownLimit:
    """Drops documents of which a larger share than `share` of the tokens is `unknown_id`."""

    unknown_id: int
    share: float

    @classmethod
    def of(cls, tokenizer: Tokenizer, settings: CleanSettings) -> "UnknownLimit | None":
        """None without a limit. Raises UserError for a tokenizer that knows every text."""
        if settings.max_unknown_share is None:
            return None
        unknown_id: Any = tokenizer.unk_id
        if unknown_id is None:
            raise UserError(
                f"max_unknown_share = {settings.max_unknown_share:g}: tokenizer {tokenizer.kind} has no "
                "unknown token, every text is known to it; leave the limit out"
            )
        return cls(int(unknown_id), settings.max_unknown_share)

    def drops(self, ids: np.ndarray, text: str, place: str, record: Record) -> bool:
        """Whether the document with these ids is dropped; either way it is counted."""
        size = len(text)
        if len(ids) and float((np.asarray(ids) == self.unknown_id).mean()) > self.share:
            record.dropped("unknown", "unknown.share", text, place)
            return True
        record.passed("unknown", size, size)
        return False
