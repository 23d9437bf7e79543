"""Duplicates in the whole corpus: keys of every document, and their deterministic joining.

Of equal or similar documents one stays: of the test split before valid before train, so that what
is trained on is in no other split, then of the lowest partition, then the first in it.

Signatures are datasketch's MinHash (Broder 1997) of the sets of n consecutive words. Documents that
agree in all rows of a band (Leskovec et al., Mining of Massive Datasets, section 3.4) are compared by
their whole signatures; what is similar enough is joined, and of each connected group one stays.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spikescale.data_pipeline.clean.settings import CleanSettings
from spikescale.data_pipeline.clean.words import ngram_hashes, normal_digest, normal_words, word_hashes

KEPT, EXACT, NEAR = 0, 1, 2
RULES = {EXACT: "duplicates.exact", NEAR: "duplicates.near"}
SPLIT_RANK = {"test": 0, "valid": 1, "train": 2}
SEED = 1
_BATCH = 4096  # n-grams that are permuted at once; bounds the memory of a long document


def key_type(settings: CleanSettings) -> np.dtype:
    """Of an array with a document's keys: split rank, digest, and MinHash signature."""
    rows = settings.near_bands * settings.near_rows if settings.near_duplicates else 0
    return np.dtype([("rank", "u1"), ("digest", "V16"), ("signature", "<u4", (rows,))])


def document_key(text: str, split: str, sha256: bytes, settings: CleanSettings) -> tuple[int, bytes, Any]:
    """The keys of one document, a row for `key_type`."""
    digest = normal_digest(text) if settings.duplicates == "normalised" else sha256[:16]
    if not settings.near_duplicates:
        return SPLIT_RANK[split], digest, ()
    rows = settings.near_bands * settings.near_rows
    return SPLIT_RANK[split], digest, signature(text, settings.near_ngram, rows)


def signature(text: str, n: int, rows: int) -> np.ndarray:
    """The MinHash of a text's n-grams of words (of all its words, if they are fewer), uint32 [rows]."""
    hashes = word_hashes(normal_words(text))
    grams = np.unique(ngram_hashes(hashes, min(n, len(hashes)) or 1)) & np.uint64(0xFFFFFFFF)
    made = _sketch(rows).copy()
    for begin in range(0, len(grams), _BATCH):
        made.update_batch(grams[begin : begin + _BATCH].tolist())
    return np.asarray(made.hashvalues, dtype=np.uint32)


@functools.lru_cache(maxsize=4)
def _sketch(rows: int) -> Any:
    """An empty sketch, whose permutations its copies share; n-grams come hashed, so nothing is hashed."""
    from datasketch import MinHash

    return MinHash(num_perm=rows, seed=SEED, hashfunc=int, scheme="affine32")


@dataclass(frozen=True)
class Join:
    """Which documents of which partition go.

    Attributes:
        fates: for each partition a uint8 array: KEPT, EXACT or NEAR.
        keepers: for each partition an int64 array [documents, 2]: partition and position of the document
            that is kept instead (of itself, where it is kept).
    """

    fates: list[np.ndarray]
    keepers: list[np.ndarray]

    def clusters(self, largest: int = 20) -> dict[str, Any]:
        """Sizes of the groups of documents of which one was kept, as plain JSON; the largest ones by name."""
        sizes: dict[tuple[int, int], int] = {}
        for fates, keepers in zip(self.fates, self.keepers, strict=True):
            found, counts = np.unique(keepers[fates != KEPT], axis=0, return_counts=True)
            for (partition, position), count in zip(found.tolist(), counts.tolist(), strict=True):
                sizes[(partition, position)] = sizes.get((partition, position), 1) + count
        histogram: dict[str, int] = {}
        for size in sorted(sizes.values()):
            histogram[str(size)] = histogram.get(str(size), 0) + 1
        first = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:largest]
        return {
            "clusters": len(sizes),
            "sizes": histogram,
            "largest": [
                {"partition": part, "document": place, "size": size} for (part, place), size in first
            ],
        }


def join(keys: Sequence[np.ndarray], settings: CleanSettings) -> Join:
    """Decide which documents stay, from the keys of every partition in number order.

    Held in memory: about 0.3 kB a document, and 4 bytes for each row of the signatures.
    """
    counts = [len(part) for part in keys]
    partition = np.repeat(np.arange(len(keys)), counts)
    position = np.concatenate([np.arange(count) for count in counts] or [np.zeros(0, dtype=np.int64)])
    ranks = np.concatenate([np.zeros(0, np.uint8), *(part["rank"] for part in keys)])
    # From here on a document's number is its place in the order of precedence.
    order = np.argsort(ranks, kind="stable")
    partition, position = partition[order], position[order]
    total = len(order)
    keeper = np.arange(total)
    fate = np.zeros(total, dtype=np.uint8)
    if settings.duplicates != "off" and total:
        digests = np.concatenate([part["digest"] for part in keys])[order]
        _, first, group = np.unique(digests, return_index=True, return_inverse=True)
        keeper = first[group.reshape(-1)]
        fate[keeper != np.arange(total)] = EXACT
    if settings.near_duplicates and total:
        alive = np.flatnonzero(fate == KEPT)
        signatures = np.concatenate([part["signature"] for part in keys])
        roots = _near_groups(signatures, order[alive], settings)
        near = alive[roots]
        fate[alive[near != alive]] = NEAR
        of_alive = keeper.copy()
        of_alive[alive] = near
        keeper = of_alive[keeper]  # a duplicate of a document that goes itself points at what stays
    fates, keepers = [], []
    original = np.empty(total, dtype=np.int64)
    original[order] = np.arange(total)
    chosen = np.stack([partition[keeper], position[keeper]], axis=1).reshape(total, 2)
    begin = 0
    for count in counts:
        mine = original[begin : begin + count]
        fates.append(fate[mine])
        keepers.append(chosen[mine])
        begin += count
    return Join(fates, keepers)


def _near_groups(signatures: np.ndarray, rows: np.ndarray, settings: CleanSettings) -> np.ndarray:
    """For each of `rows` (of the signatures) the place in `rows` of the first that is similar to it."""
    parent = np.arange(len(rows))
    enough = settings.near_similarity * signatures.shape[1]
    for band in range(settings.near_bands):
        begin = band * settings.near_rows
        part = np.ascontiguousarray(signatures[:, begin : begin + settings.near_rows][rows])
        packed = part.view(np.dtype((np.void, part.shape[1] * part.itemsize))).reshape(-1)
        _, group, counts = np.unique(packed, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[group.reshape(-1)] > 1)
        # A stable sort by group: the members of each, lowest first.
        shared = shared[np.argsort(group.reshape(-1)[shared], kind="stable")]
        ends = np.flatnonzero(np.diff(group.reshape(-1)[shared])) + 1
        for members in np.split(shared, ends):
            _join_members(members, signatures, rows, enough, parent)
    return np.array([_root(parent, place) for place in range(len(rows))], dtype=np.int64)


def _join_members(
    members: np.ndarray, signatures: np.ndarray, rows: np.ndarray, enough: float, parent: np.ndarray
) -> None:
    """Join each member with the first before it that is similar; it need not be the lowest of all."""
    while len(members) > 1:
        first, others = int(members[0]), members[1:]
        agreeing = (signatures[rows[others]] == signatures[rows[first]]).sum(axis=1)
        similar = agreeing >= enough
        for other in others[similar].tolist():
            low, high = sorted((_root(parent, first), _root(parent, other)))
            parent[high] = low
        members = others[~similar]


def _root(parent: np.ndarray, row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row
