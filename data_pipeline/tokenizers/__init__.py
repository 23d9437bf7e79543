"""Tokenizers: text to ids and back, each saved as a folder that is known by its fingerprint."""

from spikescale.data_pipeline.tokenizers.base import StreamDecoder, Tokenizer
from spikescale.data_pipeline.tokenizers.make import (
    TokenizerSpec,
    load_tokenizer,
    make_tokenizer,
    parse_spec,
    stored_fingerprint,
)

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "TokenizerSpec",
    "load_tokenizer",
    "make_tokenizer",
    "parse_spec",
    "stored_fingerprint",
]
