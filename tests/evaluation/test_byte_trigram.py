"""The trigram baseline: proper distributions, the textbook's numbers, and better than its own bigram."""

import math
from collections import Counter

import numpy as np
import pytest

from spikescale.errors import UserError
from spikescale.evaluation import ngram
from spikescale.evaluation.ngram import ByteTrigram


def some_text(words: int, seed: int) -> bytes:
    vocabulary = ["spike", "neuron", "the", "of", "and", "membrane", "decays", "état", "token", "shift", "a"]
    return " ".join(np.random.default_rng(seed).choice(vocabulary, words)).encode()


def textbook(train: bytes, test: bytes, order: int) -> float:
    """Bits of `test` by Witten-Bell written from its formula, with dictionaries."""
    history = b"\xff\xff" + train
    grams = [Counter(history[i - n : i + 1] for i in range(2, len(history))) for n in range(3)]

    def probability(context: bytes, byte: int) -> float:
        followers = {g[-1]: c for g, c in grams[len(context)].items() if g[:-1] == context}
        shorter = probability(context[1:], byte) if context else 1 / 256
        if not followers:
            return shorter
        total, kinds = sum(followers.values()), len(followers)
        return (followers.get(byte, 0) + kinds * shorter) / (total + kinds)

    stream = b"\xff\xff" + test
    return -sum(math.log2(probability(stream[i - order + 1 : i], stream[i])) for i in range(2, len(stream)))


def test_probabilities_add_up_to_one_in_every_context():
    model = ByteTrigram.fit([some_text(300, 0), bytes(range(255)), b""])
    sums = np.array([model.distribution(a, b).sum() for a in range(256) for b in range(256)])
    assert np.abs(sums - 1).max() < 1e-12
    assert model.unigram.sum() == pytest.approx(1)
    assert np.abs(model.bigram.sum(axis=1) - 1).max() < 1e-12


def test_every_byte_is_possible_everywhere():
    model = ByteTrigram.fit([b"aaaa"])
    assert model.distribution(97, 97).min() > 0
    assert model.distribution(3, 4).min() > 0


@pytest.mark.parametrize("order", [1, 2, 3])
def test_bits_are_those_of_the_textbook_formula(order):
    train, test = [b"abracadabra", b"cabbage", b""], [b"cadabra zebra", b"abba"]
    joined = [b"".join(document + b"\xff" for document in documents) for documents in (train, test)]
    expected = textbook(*joined, order) / sum(map(len, test))
    assert ByteTrigram.fit(train).bits_per_byte(test, order) == pytest.approx(expected, rel=1e-12)


def test_longer_contexts_predict_text_better():
    model = ByteTrigram.fit([some_text(3000, 0)])
    unigram, bigram, trigram = (model.bits_per_byte([some_text(500, 1)], order) for order in (1, 2, 3))
    assert trigram < 0.9 * bigram < 0.9 * unigram


def test_noise_cannot_be_compressed():
    noise = np.random.default_rng(0).integers(0, 255, 200_000, dtype=np.uint8).tobytes()
    model = ByteTrigram.fit([noise[:100_000]])
    assert model.bits_per_byte([noise[100_000:]], order=1) == pytest.approx(math.log2(255), abs=0.01)
    assert model.bits_per_byte([noise[100_000:]]) > 8


def test_counting_in_blocks_changes_nothing(monkeypatch):
    train, test = [some_text(20, seed) for seed in range(5)], [some_text(30, 9), some_text(5, 10)]
    expected = ByteTrigram.fit(train).bits_per_byte(test)
    monkeypatch.setattr(ngram, "BLOCK", 101)
    assert ByteTrigram.fit(train).bits_per_byte(test) == pytest.approx(expected, rel=1e-12)


def test_nothing_to_fit_or_to_score_is_refused():
    with pytest.raises(UserError, match="at least one training document"):
        ByteTrigram.fit([])
    with pytest.raises(UserError, match="no bytes to score"):
        ByteTrigram.fit([b"abc"]).bits_per_byte([b""])
