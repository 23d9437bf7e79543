"""UTF-8 bytes as ids."""

from collections.abc import Sequence

import numpy as np

from spikescale.data_pipeline.tokenizers.base import Tokenizer

EOS = 0xFF


class ByteTokenizer(Tokenizer):
    """Ids are the bytes of the UTF-8 encoding: 256 of them, lossless for every text.

    The byte 0xFF never occurs in UTF-8 (RFC 3629), so it ends documents.
    """

    def __init__(self) -> None:
        super().__init__("byte", 256, EOS, {})

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of each text."""
        return [list(text.encode("utf-8")) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The bytes of each text, as views of uint8."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def token_bytes(self, token_id: int) -> bytes:
        """The byte itself."""
        return b"" if token_id == EOS else bytes((token_id,))
