"""Tokenizers by specification (`make_tokenizer`) and from a saved folder (`load_tokenizer`)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.tokenizers.base import DESCRIPTION, VERSION, Tokenizer, fingerprint
from spikescale.data_pipeline.tokenizers.byte import ByteTokenizer
from spikescale.data_pipeline.tokenizers.character import FILE as CHARACTER_FILE
from spikescale.data_pipeline.tokenizers.character import CharacterTokenizer
from spikescale.data_pipeline.tokenizers.huggingface import FILE as HF_FILE
from spikescale.data_pipeline.tokenizers.huggingface import HuggingFaceTokenizer, gpt2_tokenizer_json
from spikescale.data_pipeline.tokenizers.pretrained import gpt2_tokenizer, neox_tokenizer
from spikescale.data_pipeline.tokenizers.sentence_piece import FILE as SENTENCE_PIECE_FILE
from spikescale.data_pipeline.tokenizers.sentence_piece import SentencePieceTokenizer, train_sentence_piece
from spikescale.errors import UserError
from spikescale.files import read_json

ALLOWED = (
    "byte, char, gpt2, neox, sentencepiece:SIZE[:unigram|bpe], or the path of a tokenizer.json or its folder"
)
PRETRAINED = {"gpt2": gpt2_tokenizer, "neox": neox_tokenizer, "gpt-neox-20b": neox_tokenizer}


@dataclass(frozen=True)
class TokenizerSpec:
    """A parsed specification.

    Attributes:
        text: as the user wrote it.
        kind: byte, char, pretrained, sentencepiece or path.
        size: vocabulary size and
        model_type: unigram or bpe, of SentencePiece.
    """

    text: str
    kind: str
    size: int = 0
    model_type: str = "unigram"

    @property
    def learns_from(self) -> str | None:
        """What a first pass over the training split must bring: characters, texts, or nothing (None)."""
        return {"char": "characters", "sentencepiece": "texts"}.get(self.kind)


def parse_spec(text: str) -> TokenizerSpec:
    """Read a specification such as `byte` or `sentencepiece:16000:bpe`. Raises UserError."""
    if text in ("byte", "char"):
        return TokenizerSpec(text, text)
    if text in PRETRAINED:
        return TokenizerSpec(text, "pretrained")
    if text.split(":")[0] == "sentencepiece":
        _, _, rest = text.partition(":")
        size, _, model_type = rest.partition(":")
        if not size.isdigit() or int(size) < 300 or model_type not in ("", "unigram", "bpe"):
            raise UserError(
                f"tokenizer {text!r}: write sentencepiece:SIZE[:unigram|bpe] with SIZE at least 300"
            )
        return TokenizerSpec(text, "sentencepiece", int(size), model_type or "unigram")
    if not Path(text).exists():
        raise UserError(f"tokenizer {text!r}: allowed are {ALLOWED}")
    return TokenizerSpec(text, "path")


def make_tokenizer(
    spec: TokenizerSpec | str,
    characters: Iterable[str] = (),
    texts: Sequence[str] = (),
    eos: str | None = None,
) -> Tokenizer:
    """Build the tokenizer that a specification asks for.

    Args:
        spec: what to build.
        characters: those of the training split, for `char`.
        texts: of the training split, in a fixed order, for `sentencepiece`.
        eos: the token that ends documents, for a tokenizer.json with an unusual one.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    if spec.kind == "byte":
        return ByteTokenizer()
    if spec.kind == "char":
        return CharacterTokenizer(characters)
    if spec.kind == "sentencepiece":
        return train_sentence_piece(texts, spec.size, spec.model_type)
    if spec.kind == "pretrained":
        return PRETRAINED[spec.text]()
    return _from_path(Path(spec.text), eos)


def _from_path(path: Path, eos: str | None) -> Tokenizer:
    if path.is_dir():
        if (path / DESCRIPTION).exists():
            return load_tokenizer(path)
        for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
            if (path / vocabulary).exists() and (path / merges).exists():
                content = gpt2_tokenizer_json((path / vocabulary).read_bytes(), (path / merges).read_bytes())
                return HuggingFaceTokenizer(content, "gpt2", "<|endoftext|>")
        if not (path / HF_FILE).exists():
            raise UserError(
                f"tokenizer {path}: the folder holds no {HF_FILE}, and no encoder.json with vocab.bpe"
            )
        path = path / HF_FILE
    return HuggingFaceTokenizer(path.read_bytes(), "tokenizer.json", eos)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to `folder`.

    Raises UserError when the folder is not one, or when its files are not those that were saved.
    """
    description, files = _read(folder)
    kind = description["kind"]
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        import json

        return CharacterTokenizer(json.loads(files[CHARACTER_FILE]))
    if kind == "sentencepiece":
        return SentencePieceTokenizer(files[SENTENCE_PIECE_FILE])
    return HuggingFaceTokenizer(files[HF_FILE], kind, description["eos_id"])


def stored_fingerprint(folder: Path) -> str:
    """The fingerprint of a saved tokenizer, computed from its files without loading it."""
    return str(_read(folder)[0]["sha256"])


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    description = read_json(Path(folder) / DESCRIPTION)
    path = Path(folder) / DESCRIPTION
    if not isinstance(description, dict) or description.get("version") != VERSION:
        raise UserError(
            f"{path}: tokenizer format {_version(description)!r} is unknown; this program reads {VERSION}"
        )
    files = {}
    for name in description["files"]:
        try:
            files[name] = (Path(folder) / Path(name).name).read_bytes()
        except OSError as error:
            raise UserError(f"{Path(folder) / name}: cannot be read ({error.strerror})") from None
    found = fingerprint(description["kind"], description["vocab_size"], description["eos_id"], files)
    if found != description["sha256"]:
        raise UserError(
            f"{folder}: the tokenizer's files were changed: fingerprint {found[:12]}, "
            f"saved as {description['sha256'][:12]}"
        )
    return description, files


def _version(description: Any) -> Any:
    return description.get("version") if isinstance(description, dict) else None
