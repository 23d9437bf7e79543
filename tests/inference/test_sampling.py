"""The filters keep what they promise, and draws follow the distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikescale.errors import UserError
from spikescale.inference.sampling import SamplingSettings, choose, keep_top_k, keep_top_p, penalise_seen

rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40).map(lambda row: torch.tensor([row]))


@settings(deadline=None)
@given(logits=rows, k=st.integers(1, 50))
def test_top_k_keeps_the_k_largest_unchanged(logits, k):
    kept = keep_top_k(logits, k)
    finite = kept.isfinite()
    assert int(finite.sum()) == min(k, logits.shape[1])
    assert torch.equal(kept[finite], logits[finite])
    if k < logits.shape[1]:
        assert logits[finite].min() >= logits[~finite].max()


@settings(deadline=None)
@given(logits=rows, p=st.floats(1e-6, 0.999))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(logits, p):
    kept = keep_top_p(logits, p).isfinite()[0]
    probabilities = logits[0].softmax(-1)
    assert kept.any()
    assert float(probabilities[kept].sum()) >= p - 1e-5
    assert float(probabilities[kept].sum() - probabilities[kept].min()) < p + 1e-5
    if not kept.all():
        assert probabilities[kept].min() >= probabilities[~kept].max()


def test_top_p_keeps_one_token_however_small_p_is():
    kept = keep_top_p(torch.tensor([[1.0, 3.0, 2.0]]), 1e-9)
    assert kept.isfinite().tolist() == [[False, True, False]]


@pytest.mark.parametrize("spread", [0.1, 6.0])  # the nucleus holds most tokens, or a few
def test_top_p_keeps_the_same_in_a_large_vocabulary_whether_few_or_many_are_needed(spread):
    logits = spread * torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    kept = keep_top_p(logits, 0.9)
    for row, row_kept in zip(logits, kept, strict=True):
        probabilities = row.double().softmax(-1).sort(descending=True)
        count = int((probabilities.values.cumsum(0) < 0.9).sum()) + 1
        assert abs(int(row_kept.isfinite().sum()) - count) <= 1
        assert torch.equal(row_kept[row_kept.isfinite()], row[row_kept.isfinite()])
        assert row[row_kept.isfinite()].min() >= row[~row_kept.isfinite()].max()


def test_there_is_nothing_to_draw_from_numbers_that_are_none():
    logits = torch.zeros(2, 5)
    logits[1, 3] = math.nan
    with pytest.raises(UserError, match="not finite numbers"):
        choose(logits, SamplingSettings(), torch.Generator())


@settings(deadline=None)
@given(logits=rows, penalty=st.floats(1.01, 3))
def test_a_penalty_lowers_seen_tokens_and_leaves_the_others(logits, penalty):
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, 0] = True
    penalised = penalise_seen(logits, seen, penalty)
    assert torch.equal(penalised[0, 1:], logits[0, 1:])
    assert penalised[0, 0] < logits[0, 0] or abs(float(logits[0, 0])) < 1e-30


def test_temperature_zero_takes_the_largest_whatever_the_seed():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(3))
    for seed in range(3):
        drawn = choose(logits, SamplingSettings(temperature=0), torch.Generator().manual_seed(seed))
        assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_frequencies_of_the_softmax(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = choose(
        logits.expand(40_000, -1), SamplingSettings(temperature=temperature), torch.Generator().manual_seed(0)
    )
    frequencies = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(frequencies, (logits / temperature).softmax(-1), atol=0.01)


def test_draws_come_only_from_what_both_filters_keep():
    logits = torch.tensor([[5.0, 4.9, 4.8, 0.0, -3.0]]).expand(500, -1)
    drawn = choose(logits, SamplingSettings(top_k=2), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1}
    drawn = choose(logits, SamplingSettings(top_k=4, top_p=0.9), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"max_tokens": -1},
    ],
)
def test_settings_out_of_range_are_refused_by_name(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingSettings(**bad)
