"""The learning rate is the published shape at every step."""

import itertools
import math

import pytest

from spikescale.config import TrainConfig
from spikescale.training.schedule import learning_rate


def rates(**settings):
    train = TrainConfig(steps=100, warmup_steps=10, lr=1.0, min_lr=0.1, **settings)
    return [learning_rate(step, train) for step in range(100)]


def test_warmup_rises_linearly_to_lr():
    assert rates(schedule="constant")[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])


def test_constant_stays():
    assert rates(schedule="constant")[10:] == [1.0] * 90


def test_cosine_passes_its_middle_and_ends_at_min_lr():
    curve = rates(schedule="cosine")
    assert curve[10] == 1.0
    assert curve[99] == pytest.approx(0.1)
    assert curve[10 + 40] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 40 / 89)))
    assert all(a > b for a, b in itertools.pairwise(curve[10:]))


def test_linear_falls_by_equal_steps():
    curve = rates(schedule="linear")
    differences = [a - b for a, b in itertools.pairwise(curve[10:])]
    assert differences == pytest.approx([0.9 / 89] * 89)


def test_wsd_is_stable_until_its_last_fraction():
    curve = rates(schedule="wsd", decay_fraction=0.2)
    assert curve[10:81] == [1.0] * 71
    assert curve[81] < 1.0
    assert curve[99] == pytest.approx(0.1)


def test_one_step_and_all_warmup_do_not_divide_by_zero():
    assert learning_rate(0, TrainConfig(steps=1, warmup_steps=0, lr=1.0, min_lr=0.1)) == 1.0
    assert learning_rate(4, TrainConfig(steps=5, warmup_steps=5, lr=1.0, min_lr=0.1)) == 1.0
