"""Planted duplicates of known similarity are found, and which one stays does not depend on chance."""

import hashlib
import itertools
import random

import numpy as np
import pytest

from spikescale.data_pipeline.clean.duplicates import (
    EXACT,
    KEPT,
    NEAR,
    document_key,
    join,
    key_type,
    signature,
)
from spikescale.data_pipeline.clean.settings import CleanSettings

NEAR_ONLY = CleanSettings(near_duplicates=True)


def passage(seed: int, count: int = 400) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(10**9)}" for _ in range(count)]


def similar(words: list[str], similarity: float, seed: int) -> list[str]:
    """Another text whose set of 5-grams has about this Jaccard similarity: the tail is replaced."""
    # Of n words the first k are shared: k - 4 of 2 (n - 4) - (k - 4) different 5-grams.
    grams = len(words) - 4
    shared = round(2 * grams * similarity / (1 + similarity))
    return words[: shared + 4] + passage(seed, len(words) - shared - 4)


def jaccard(one: list[str], two: list[str]) -> float:
    sets = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def keys_of(documents: list[tuple[str, str]], settings: CleanSettings) -> np.ndarray:
    rows = [
        document_key(text, split, hashlib.sha256(text.encode()).digest(), settings)
        for split, text in documents
    ]
    return np.array(rows, dtype=key_type(settings))


def fates(partitions: list[list[tuple[str, str]]], settings: CleanSettings) -> list[list[int]]:
    return [part.tolist() for part in join([keys_of(part, settings) for part in partitions], settings).fates]


def test_the_signature_estimates_the_similarity_of_sets() -> None:
    errors = []
    for seed in range(30):
        one = passage(seed)
        for similarity in (0.3, 0.6, 0.9):
            two = similar(one, similarity, 1000 + seed)
            exact = jaccard(one, two)
            assert abs(exact - similarity) < 0.01
            agree = signature(" ".join(one), 5, 256) == signature(" ".join(two), 5, 256)
            errors.append(agree.mean() - exact)
    # The standard error of one estimate is at most 0.5 / 16; of the mean of 90 it is 0.0033.
    assert abs(np.mean(errors)) < 0.01 and np.abs(errors).max() < 5 * 0.5 / 16


def test_planted_near_duplicates_are_found_and_others_are_not() -> None:
    planted, partition = 0, []
    for seed in range(60):
        words = passage(seed)
        partition.append(("train", " ".join(words)))
        if seed % 2:
            partition.append(("train", " ".join(similar(words, 0.92, 5000 + seed))))
            planted += 1
        else:
            partition.append(("train", " ".join(similar(words, 0.4, 5000 + seed))))
    (found,) = fates([partition], NEAR_ONLY)
    expected = [NEAR if number % 4 == 3 else KEPT for number in range(120)]
    assert planted == 30 and found == expected


def test_the_threshold_is_on_the_estimated_similarity() -> None:
    words = passage(1)
    partition = [("train", " ".join(words)), ("train", " ".join(similar(words, 0.85, 2)))]
    agree = (signature(partition[0][1], 5, 112) == signature(partition[1][1], 5, 112)).mean()
    assert 0.75 < agree < 0.95
    for threshold, fate in ((agree - 0.005, NEAR), (agree + 0.005, KEPT)):
        settings = CleanSettings(near_duplicates=True, near_similarity=threshold)
        assert fates([partition], settings) == [[KEPT, fate]]


def test_the_lowest_partition_then_the_first_document_stays() -> None:
    text, other = " ".join(passage(1)), " ".join(passage(2))
    partitions = [[("train", other)], [("train", text), ("train", text)], [("train", text), ("train", other)]]
    settings = CleanSettings(duplicates="exact")
    joined = join([keys_of(part, settings) for part in partitions], settings)
    assert [part.tolist() for part in joined.fates] == [[KEPT], [KEPT, EXACT], [EXACT, EXACT]]
    assert joined.keepers[2].tolist() == [[1, 0], [0, 0]] and joined.keepers[1].tolist() == [[1, 0], [1, 0]]
    assert joined.clusters() == {
        "clusters": 2,
        "sizes": {"2": 1, "3": 1},
        "largest": [
            {"partition": 1, "document": 0, "size": 3},
            {"partition": 0, "document": 0, "size": 2},
        ],
    }


def test_a_training_document_goes_when_valid_or_test_has_it() -> None:
    text, near = " ".join(passage(1)), " ".join(similar(passage(1), 0.95, 3))
    partitions = [[("train", text), ("valid", text)], [("test", text)], [("test", near), ("train", near)]]
    exact = fates(partitions, CleanSettings(duplicates="exact"))
    assert exact == [[EXACT, EXACT], [KEPT], [KEPT, EXACT]]
    both = fates(partitions, CleanSettings(duplicates="exact", near_duplicates=True))
    assert both == [[EXACT, EXACT], [KEPT], [NEAR, EXACT]]


def test_normalised_duplicates_ignore_case_and_punctuation() -> None:
    partition = [("train", "Hello, world!"), ("train", "hello World"), ("train", "hello there")]
    assert fates([partition], CleanSettings(duplicates="normalised")) == [[KEPT, EXACT, KEPT]]
    assert fates([partition], CleanSettings(duplicates="exact")) == [[KEPT, KEPT, KEPT]]


def test_a_chain_of_similar_documents_is_one_group_that_names_its_first() -> None:
    """A resembles B and B resembles C: one stays, and what equals one of them points at what stays."""
    a = passage(1)
    b = a[20:] + passage(2, 20)
    c = b[20:] + passage(3, 20)
    settings = CleanSettings(
        duplicates="exact", near_duplicates=True, near_similarity=0.85, near_bands=56, near_rows=2
    )
    assert jaccard(a, b) > 0.88 and jaccard(a, c) < 0.83
    partitions = [[("train", " ".join(c))], [("train", " ".join(a)), ("train", " ".join(b))]]
    partitions += [[("train", " ".join(c)), ("train", " ".join(b))]]
    joined = join([keys_of(part, settings) for part in partitions], settings)
    assert [part.tolist() for part in joined.fates] == [[KEPT], [NEAR, NEAR], [EXACT, EXACT]]
    assert all((part == [0, 0]).all() for part in joined.keepers)


def test_how_a_corpus_is_partitioned_does_not_change_what_stays() -> None:
    documents = []
    for seed in range(40):
        words = passage(seed, 60)
        documents += [("train", " ".join(words)), ("train", " ".join(similar(words, 0.9, 100 + seed % 3)))]
    documents += documents[::7]
    settings = CleanSettings(duplicates="normalised", near_duplicates=True)
    whole = fates([documents], settings)[0]
    for cuts in ((10,), (1, 2, 50), (0, 40, 40, 93)):
        bounds = [0, *cuts, len(documents)]
        parts = [documents[low:high] for low, high in itertools.pairwise(bounds)]
        assert [fate for part in fates(parts, settings) for fate in part] == whole
    assert whole.count(EXACT) == 12 and whole.count(NEAR) > 30


@pytest.mark.parametrize("text", ["", "one", "one two three four", "!?"])
def test_texts_shorter_than_an_ngram_have_a_signature(text: str) -> None:
    assert signature(text, 5, 16).shape == (16,) and signature(text, 5, 16).dtype == np.uint32
    partition = [("train", text), ("train", "one two three five"), ("train", text)]
    assert fates([partition], NEAR_ONLY)[0][2] == NEAR


def test_no_documents_at_all() -> None:
    settings = CleanSettings(duplicates="exact", near_duplicates=True)
    assert fates([[], []], settings) == [[], []]
    assert join([], settings).clusters()["clusters"] == 0
