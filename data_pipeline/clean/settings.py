"""What is cleaned, and how: part of a preparation's request."""

import importlib.metadata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.clean.rules import GROUPS, RULES, Limits, limits_of
from spikescale.errors import UserError
from spikescale.files import sha256_file, sha256_text

DUPLICATES = ("off", "exact", "normalised")


@dataclass(frozen=True)
class CleanSettings:
    """Stages of cleaning; by default all are off.

    Attributes:
        fix_unicode: repair mojibake and control characters (ftfy), and compose characters (NFC).
        min_characters, max_characters: of a document, after the repair.
        languages: ISO 639 codes to keep; empty keeps all. language_score: least probability.
        quality: groups of rules, of GROUPS. rules: limits that differ from the published ones.
        adult_words: `builtin` or a file of words. adult_limit: more occurrences than these drop.
        evaluation_sets: files, or prepared folders (FOLDER or FOLDER:SPLIT), that must not be trained on.
        evaluation_ngram: words of the n-grams compared. evaluation_overlap: a document of which a larger
            share of n-grams stands in an evaluation set is dropped; 0: any.
        scrub_pii: replace e-mail addresses, public IP addresses and telephone numbers by placeholders.
        duplicates: `exact` (equal text) or `normalised` (equal words, whatever case and punctuation).
        near_duplicates: documents of similar words (MinHash-LSH). near_similarity: least estimated Jaccard
            similarity of their sets of near_ngram words; near_bands, near_rows: of the signatures.
        max_unknown_share: of a document's tokens, that the tokenizer does not know; None: no limit.
    """

    fix_unicode: bool = False
    min_characters: int | None = None
    max_characters: int | None = None
    languages: tuple[str, ...] = ()
    language_score: float = 0.65
    quality: tuple[str, ...] = ()
    rules: tuple[tuple[str, float | None], ...] = ()
    adult_words: str | None = None
    adult_limit: int = 0
    evaluation_sets: tuple[str, ...] = ()
    evaluation_ngram: int = 13
    evaluation_overlap: float = 0.0
    scrub_pii: bool = False
    duplicates: str = "off"
    near_duplicates: bool = False
    near_similarity: float = 0.75
    near_ngram: int = 5
    near_bands: int = 14
    near_rows: int = 8
    max_unknown_share: float | None = None

    def __post_init__(self) -> None:
        for name, least in (
            *(("min_characters", 1), ("max_characters", 1), ("adult_limit", 0), ("evaluation_ngram", 1)),
            *(("near_ngram", 1), ("near_bands", 1), ("near_rows", 1)),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} = {value}: must be at least {least}")
        for name in ("language_score", "evaluation_overlap", "near_similarity", "max_unknown_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} = {value}: must be 0 to 1")
        low, high = self.min_characters, self.max_characters
        if low is not None and high is not None and low > high:
            raise UserError(f"min_characters = {low}: must be at most max_characters = {high}")
        if self.duplicates not in DUPLICATES:
            raise UserError(f"duplicates {self.duplicates!r}: must be one of {', '.join(DUPLICATES)}")
        for group in self.quality:
            if group not in GROUPS:
                raise UserError(f"quality {group!r}: must be one of {', '.join(GROUPS)}")
        for name, _ in self.rules:
            if name not in RULES or name.split(".")[0] not in self.quality:
                group = name.split(".")[0]
                raise UserError(f"quality rule {name!r}: is unknown, or its group {group!r} is not chosen")

    @property
    def active(self) -> bool:
        """Whether anything is to be done."""
        return bool(
            self.fix_unicode
            or self.min_characters is not None
            or self.max_characters is not None
            or self.languages
            or self.quality
            or self.adult_words
            or self.evaluation_sets
            or self.scrub_pii
            or self.joins
            or self.max_unknown_share is not None
        )

    @property
    def joins(self) -> bool:
        """Whether documents of the whole corpus are compared with each other."""
        return self.duplicates != "off" or self.near_duplicates

    @property
    def limits(self) -> Limits:
        """The limits of the quality rules."""
        return limits_of(self.rules)

    def identity(self) -> dict[str, Any]:
        """What the result depends on, as plain JSON: of files the content, not the path."""
        described = asdict(self)
        described["rules"] = dict(self.rules)
        for name in ("languages", "quality"):
            described[name] = list(described[name])
        if self.adult_words is not None:
            described["adult_words"] = _word_list_identity(self.adult_words)
        described["evaluation_sets"] = [_evaluation_identity(word) for word in self.evaluation_sets]
        needed = {
            "ftfy": self.fix_unicode,
            "py3langid": bool(self.languages),
            "datasketch": self.near_duplicates,
        }
        try:
            described["libraries"] = {
                name: importlib.metadata.version(name) for name, used in needed.items() if used
            }
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f"cleaning needs {error.name}: pip install {error.name}") from None
        return described


def _word_list_identity(choice: str) -> str:
    from spikescale.data_pipeline.clean.adult import read_word_list

    return sha256_text("\n".join(read_word_list(choice)))


def split_evaluation_word(word: str) -> tuple[Path, str | None]:
    """FOLDER:SPLIT as folder and split; anything else as a path alone."""
    folder, _, split = word.rpartition(":")
    if folder and split in ("train", "valid", "test") and Path(folder).is_dir():
        return Path(folder), split
    return Path(word), None


def _evaluation_identity(word: str) -> dict[str, Any]:
    from spikescale.data_pipeline.manifest import load_manifest

    path, split = split_evaluation_word(word)
    if path.is_dir():
        return {"data": load_manifest(path, verify="size").sha256, "split": split}
    if not path.is_file():
        raise UserError(f"evaluation set {word}: neither a file nor a prepared folder, nor FOLDER:SPLIT")
    return {"name": path.name, "sha256": sha256_file(path)}
