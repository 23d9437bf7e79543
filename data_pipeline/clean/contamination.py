"""Which n-grams of words stand in evaluation sets, and how many of them a text has.

After Brown et al. 2020 (GPT-3), appendix C: 13-grams of lower-case words without punctuation. An
evaluation text with fewer words is compared as a whole, if it has at least 8, their least n.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikescale.data_pipeline.clean.settings import split_evaluation_word
from spikescale.data_pipeline.clean.words import ngram_hashes, normal_words, word_hashes
from spikescale.errors import UserError
from spikescale.files import sha256_file, written_aside

LEAST_WORDS = 8


def evaluation_texts(words: Sequence[str]) -> Iterator[str]:
    """The texts of evaluation sets: of files, as `--source` would read them, and of prepared folders."""
    from spikescale.data_pipeline.manifest import load_manifest
    from spikescale.data_pipeline.sources import open_source
    from spikescale.data_pipeline.tokenizers import load_tokenizer
    from spikescale.data_pipeline.tokens import iterate_documents

    for word in words:
        path, split = split_evaluation_word(word)
        if path.is_dir():
            manifest = load_manifest(path)
            tokenizer = load_tokenizer(manifest.tokenizer_folder)
            for name in [split] if split else list(manifest.splits):
                for ids in iterate_documents(manifest, name):
                    yield tokenizer.decode(ids.tolist())
        else:
            # A Path: as a word, a name without a folder might be that of a source.
            for partition in open_source([str(path.absolute())]).partitions():
                for document in partition.documents():
                    yield document.text


def write_index(words: Sequence[str], n: int, path: Path) -> str:
    """Write the n-grams of the evaluation sets and return the file's SHA-256. Raises UserError if none."""
    found: dict[int, list[np.ndarray]] = {}
    for text in evaluation_texts(words):
        hashes = word_hashes(normal_words(text))
        size = min(n, len(hashes))
        if size == n or size >= LEAST_WORDS:
            found.setdefault(size, []).append(ngram_hashes(hashes, size))
    if not found:
        raise UserError(f"evaluation sets {', '.join(words)}: no text of {min(n, LEAST_WORDS)} words or more")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {
            f"n{size}": np.unique(np.concatenate(parts)) for size, parts in sorted(found.items())
        }
        np.savez(file, **arrays)
    return sha256_file(path)


@functools.lru_cache(maxsize=2)
def load_index(path: Path, sha256: str) -> "NgramIndex":
    """What `write_index` wrote, once a process. Raises UserError when it is another file now."""
    if not path.exists() or sha256_file(path) != sha256:
        raise UserError(f"{path}: missing or changed while it was in use; run the command again")
    with np.load(path) as content:
        return NgramIndex({int(name[1:]): content[name] for name in content.files})


class NgramIndex:
    """Sorted n-gram hashes, by n."""

    def __init__(self, hashes: dict[int, np.ndarray]) -> None:
        self._hashes = hashes

    def overlap(self, text: str) -> float:
        """The largest share, over the sizes n, of a text's n-grams that stand in an evaluation set."""
        words = word_hashes(normal_words(text))
        largest = 0.0
        for n, known in self._hashes.items():
            grams = ngram_hashes(words, n)
            if len(grams):
                places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
                largest = max(largest, float((known[places] == grams).mean()))
        return largest
