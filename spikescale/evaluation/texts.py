"""What a language model is evaluated on: a split of prepared data, or files of text as they are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spikescale.errors import UserError
from spikescale.evaluation.language_model import TokenSequence

if TYPE_CHECKING:
    from spikescale.data_pipeline.manifest import Manifest
    from spikescale.data_pipeline.tokenizers import Tokenizer

Rewrite = Callable[[str], str]


@dataclass(frozen=True)
class EvaluatedText:
    """Documents as tokens, and how long they are in other units.

    Attributes:
        tokens: of all documents, each with its end.
        bytes, characters: of the text that the model reads.
        words, line_ends: of the text as published, before anything was rewritten: what lies between white
            space, and the ends of lines.
    """

    tokens: TokenSequence
    documents: int
    bytes: int
    characters: int
    words: float
    line_ends: float


def split_text(
    manifest: "Manifest",
    split: str,
    tokenizer: "Tokenizer",
    rewrite: Rewrite | None = None,
    limit: int | None = None,
) -> EvaluatedText:
    """A split of prepared data; `rewrite`: decoded, changed and encoded again.

    Its words are counted in what its tokens decode to. With `limit` only documents that begin before this
    token are decoded: words and line ends of the whole are estimated by theirs, a rewritten text ends there.
    Raises UserError for data that another tokenizer made.
    """
    from spikescale.data_pipeline.stream import iterate_documents, split_tokens

    totals = manifest.totals(split)
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"{manifest.folder}: was prepared with another tokenizer ({manifest.tokenizer.sha256[:12]}) "
            f"than the model's ({tokenizer.sha256[:12]})"
        )
    documents = iterate_documents(manifest, split)
    if rewrite is not None:
        return encoded_text((tokenizer.decode(ids.tolist()) for ids in documents), tokenizer, rewrite, limit)
    words = line_ends = seen = 0
    for ids in documents:
        text = tokenizer.decode(ids.tolist())
        words += len(text.split())
        line_ends += text.count("\n")
        seen += len(ids)
        if limit is not None and seen >= limit:
            break
    share = seen / totals.tokens if seen else 1
    tokens = split_tokens(manifest, split)
    return EvaluatedText(
        tokens, totals.documents, totals.bytes, totals.characters, words / share, line_ends / share
    )


def file_text(
    paths: Sequence[Path],
    tokenizer: "Tokenizer",
    rewrite: Rewrite | None = None,
    limit: int | None = None,
) -> EvaluatedText:
    """Text files, each a document, or the records of .jsonl and .parquet files. Raises UserError."""
    return encoded_text(file_documents(paths), tokenizer, rewrite, limit)


def file_documents(paths: Sequence[Path]) -> Iterator[str]:
    """The documents of files, text where the name does not say otherwise."""
    from spikescale.data_pipeline.sources import open_source
    from spikescale.data_pipeline.sources.readers import format_of

    for path in paths:
        if not path.is_file():
            raise UserError(f"--text {path}: no such file")
        given: dict[str, Any] = {} if format_of(path) else {"format": "text"}
        for partition in open_source([str(path)], **given).partitions():
            yield from (document.text for document in partition.documents())


def encoded_text(
    texts: Iterable[str],
    tokenizer: "Tokenizer",
    rewrite: Rewrite | None = None,
    limit: int | None = None,
) -> EvaluatedText:
    """Documents in memory, up to the one that holds token number `limit`.

    Raises UserError for text that cannot be encoded.
    """
    parts: list[np.ndarray] = []
    size = characters = words = line_ends = count = 0
    for text in texts:
        words += len(text.split())
        line_ends += text.count("\n")
        read = text if rewrite is None else rewrite(text)
        try:
            size += len(read.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UserError(f"not valid Unicode (lone surrogate U+{ord(read[error.start]):04X})") from None
        characters += len(read)
        (ids,) = tokenizer.encode_arrays([read])
        parts += [np.asarray(ids, np.int64), np.array([tokenizer.eos_id], np.int64)]
        count += len(ids) + 1
        if limit is not None and count >= limit:
            break
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return EvaluatedText(tokens, len(parts) // 2, size, characters, words, line_ends)
