"""Tokenizers by specification (`make_tokenizer`) and from a saved folder (`load_tokenizer`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.tokenizers.base import DESCRIPTION, VERSION, Tokenizer, fingerprint
from spikescale.data_pipeline.tokenizers.byte import ByteTokenizer
from spikescale.data_pipeline.tokenizers.character import FILE as CHARACTER_FILE
from spikescale.data_pipeline.tokenizers.character import CharacterTokenizer
from spikescale.data_pipeline.tokenizers.conditioned import FILE as CONDITIONS_FILE
from spikescale.data_pipeline.tokenizers.conditioned import ConditionedTokenizer, read_conditions
from spikescale.data_pipeline.tokenizers.huggingface import FILE as HF_FILE
from spikescale.data_pipeline.tokenizers.huggingface import HuggingFaceTokenizer, gpt2_tokenizer_json
from spikescale.data_pipeline.tokenizers.pretrained import gpt2_tokenizer, neox_tokenizer
from spikescale.data_pipeline.tokenizers.sentence_piece import FILE as SENTENCE_PIECE_FILE
from spikescale.data_pipeline.tokenizers.sentence_piece import SentencePieceTokenizer, train_sentence_piece
from spikescale.data_pipeline.tokenizers.syllable import DEFAULT_LANGUAGE as SYLLABLE_LANGUAGE
from spikescale.data_pipeline.tokenizers.syllable import DEFAULT_SIZE as SYLLABLE_SIZE
from spikescale.data_pipeline.tokenizers.syllable import (
    SyllableTokenizer,
    hyphenation_dictionary,
    learn_syllables,
)
from spikescale.errors import UserError
from spikescale.files import read_json

ALLOWED = (
    "byte, char, gpt2, neox, sentencepiece:SIZE[:unigram|bpe], syllable[:SIZE[:LANGUAGE]], "
    "or the path of a tokenizer.json or its folder"
)
PRETRAINED = {"gpt2": gpt2_tokenizer, "neox": neox_tokenizer, "gpt-neox-20b": neox_tokenizer}


@dataclass(frozen=True)
class TokenizerSpec:
    """A parsed specification.

    Attributes:
        text: as the user wrote it.
        kind: byte, char, pretrained, sentencepiece, syllable or path.
        size: of SentencePiece's vocabulary, or the number of syllables.
        model_type: unigram or bpe, of SentencePiece.
        language: whose hyphenation makes syllables.
    """

    text: str
    kind: str
    size: int = 0
    model_type: str = "unigram"
    language: str = SYLLABLE_LANGUAGE

    @property
    def learns_from(self) -> str | None:
        """What a first pass over the training split must bring: characters, texts, syllables, or None."""
        return {"char": "characters", "sentencepiece": "texts", "syllable": "syllables"}.get(self.kind)


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
    if text.split(":")[0] == "syllable":
        size, _, language = text.partition(":")[2].partition(":")
        if (size and not (size.isdigit() and int(size))) or (":" in text and not size):
            raise UserError(f"tokenizer {text!r}: write syllable[:SIZE[:LANGUAGE]] with SIZE at least 1")
        language = language or SYLLABLE_LANGUAGE
        hyphenation_dictionary(language)
        return TokenizerSpec(text, "syllable", int(size or SYLLABLE_SIZE), language=language)
    if not Path(text).exists():
        raise UserError(f"tokenizer {text!r}: allowed are {ALLOWED}")
    return TokenizerSpec(text, "path")


def make_tokenizer(
    spec: TokenizerSpec | str,
    characters: Iterable[str] = (),
    texts: Sequence[str] = (),
    eos: str | None = None,
    syllables: Mapping[str, int] | None = None,
) -> Tokenizer:
    """Build the tokenizer that a specification asks for.

    Args:
        spec: what to build.
        characters: those of the training split, for `char` and `syllable`.
        texts: of the training split, in a fixed order, for `sentencepiece`.
        eos: the token that ends documents, for a tokenizer.json with an unusual one.
        syllables: counts of `count_syllables` over the training split, for `syllable`.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    if spec.kind == "byte":
        return ByteTokenizer()
    if spec.kind == "char":
        return CharacterTokenizer(characters)
    if spec.kind == "sentencepiece":
        return train_sentence_piece(texts, spec.size, spec.model_type)
    if spec.kind == "syllable":
        return learn_syllables(syllables or {}, characters, spec.size, spec.language)
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
    if CONDITIONS_FILE in files:
        conditions = read_conditions(files.pop(CONDITIONS_FILE))
        inner = _from_files(conditions["kind"], conditions["eos_id"], files)
        return ConditionedTokenizer(inner, conditions["values"], conditions["dropout"])
    return _from_files(description["kind"], description["eos_id"], files)


def _from_files(kind: str, eos_id: int, files: Mapping[str, bytes]) -> Tokenizer:
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        import json

        return CharacterTokenizer(json.loads(files[CHARACTER_FILE]))
    if kind == "sentencepiece":
        return SentencePieceTokenizer(files[SENTENCE_PIECE_FILE])
    if kind == "syllable":
        return SyllableTokenizer.from_files(files)
    return HuggingFaceTokenizer(files[HF_FILE], kind, eos_id)


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
