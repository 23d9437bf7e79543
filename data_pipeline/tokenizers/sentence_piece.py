"""SentencePiece trained on the corpus itself."""

import io
from collections.abc import Iterator, Sequence

from spikescale.data_pipeline.tokenizers.base import Tokenizer
from spikescale.errors import UserError

FILE = "sentencepiece.model"
PIECE_CHARACTERS = 4000  # length at which training lines are cut; the trainer's cost grows with it


class SentencePieceTokenizer(Tokenizer):
    """A unigram or BPE model (Kudo and Richardson 2018) with byte fallback and no normalisation.

    So every text survives encoding and decoding, except that U+2581, SentencePiece's own sign for a
    space, comes back as a space.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        super().__init__("sentencepiece", self._model.get_piece_size(), self._model.eos_id(), {FILE: model})
        self.unk_id = self._model.unk_id()
        self._bytes = [self._piece_bytes(token_id) for token_id in range(self.vocab_size)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        encoded: list[list[int]] = self._model.encode(list(texts), out_type=int, num_threads=1)
        return encoded

    def token_bytes(self, token_id: int) -> bytes:
        """The piece's text, or the byte of a byte piece."""
        return self._bytes[token_id]

    def _piece_bytes(self, token_id: int) -> bytes:
        if self._model.is_control(token_id):
            return b""
        if self._model.is_unknown(token_id):
            return "\ufffd".encode()
        piece = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes((int(piece[3:5], 16),))
        return str(piece).replace("\u2581", " ").encode("utf-8")


def train_sentence_piece(texts: Sequence[str], vocab_size: int, model_type: str) -> SentencePieceTokenizer:
    """Train on `texts`, in their order and on one thread, so that equal texts give an equal model.

    Raises UserError when the texts are too few for the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            num_threads=1,
            shuffle_input_sentence=False,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            character_coverage=0.9999,
            max_sentence_length=8 * PIECE_CHARACTERS,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"tokenizer sentencepiece:{vocab_size}: training failed ({reason})") from None
    return SentencePieceTokenizer(model.getvalue())


def _lines(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for begin in range(0, len(line), PIECE_CHARACTERS):
                piece = line[begin : begin + PIECE_CHARACTERS]
                if piece.strip() and "\0" not in piece:
                    yield piece
