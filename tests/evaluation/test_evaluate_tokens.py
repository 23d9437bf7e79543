"""Every token of a split is scored once, from the context that the stride promises."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spikescale.errors import UserError
from spikescale.evaluation import LanguageModelResult, evaluate_tokens
from spikescale.evaluation.language_model import windows

VOCABULARY = 50
EOS = 0


class RunningSum(nn.Module):
    """Predicts from the sum of everything read since the state was empty: the context shows in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(997, VOCABULARY, generator=torch.Generator().manual_seed(1)))
        self.lengths: list[int] = []

    def forward(
        self, tokens: Tensor, state: list | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list]:
        before = state[0]["sum"] if state else tokens.new_zeros(tokens.shape[0])
        sums = before[:, None] + (tokens + 1).cumsum(dim=1)
        self.lengths.append(tokens.shape[1])
        return self.table[sums % 997], [{"sum": sums[:, -1]}]


class Unigram(nn.Module):
    """Predicts each id with a probability of its own, whatever the context."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(
        self, tokens: Tensor, state: list | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list]:
        return self.logits.expand(*tokens.shape, -1), []


def some_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCABULARY, count)


@torch.no_grad()
def brute_force(model: nn.Module, tokens: np.ndarray, context_length: int, shortest: int) -> float:
    """Score token by token: each from the window of stride `context_length - shortest + 1` that owns it."""
    stream = np.concatenate(([EOS], tokens))
    stride, total = context_length - shortest + 1, 0.0
    for i in range(len(tokens)):
        start = 0 if i < context_length else (i - context_length) // stride * stride + stride
        logits, _ = model(torch.from_numpy(stream[start : i + 1])[None])
        total -= float(logits[0, -1].log_softmax(-1)[tokens[i]])
    return total


@given(count=st.integers(1, 300), context=st.integers(1, 40), data=st.data())
def test_windows_score_every_position_once_and_in_order(count, context, data):
    stride = data.draw(st.integers(1, context))
    found = list(windows(count, context, stride))
    scored = [p for start, length, n in found for p in range(start + length - n, start + length)]
    assert scored == list(range(count))
    assert all(length == context for _, length, _ in found[:-1])
    assert all(n == stride for _, _, n in found[1:-1])
    assert all(later.start - earlier.start == stride for earlier, later in pairwise(found))


@given(count=st.integers(1, 300), context=st.integers(1, 40), data=st.data())
def test_a_full_last_window_scores_the_same_positions_from_more_context(count, context, data):
    stride = data.draw(st.integers(1, context))
    plain, full = (list(windows(count, context, stride, full_last)) for full_last in (False, True))
    assert full[:-1] == plain[:-1]
    assert full[-1].scored == plain[-1].scored
    assert (full[-1].start + full[-1].length, full[-1].length) == (count, min(context, count))


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 120),
    context=st.integers(1, 30),
    batch=st.integers(1, 9),
    limit=st.none() | st.integers(1, 150),
    data=st.data(),
)
def test_each_token_is_counted_exactly_once_whatever_stride_and_batch_size(
    count, context, batch, limit, data
):
    # Every id occurs once and costs an amount of its own, so that the sum tells which were counted.
    logits = torch.randn(count + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = 1 + np.random.default_rng(0).permutation(count)
    stride, progress = data.draw(st.integers(1, context)), []
    nats, scored = evaluate_tokens(
        Unigram(logits),
        ids,
        context_length=context,
        stride=stride,
        batch_size=batch,
        eos_id=EOS,
        limit=limit,
        progress=progress.append,
    )
    kept = ids[:limit]
    assert scored == len(kept) == sum(progress)
    assert nats == pytest.approx(-float(logits.log_softmax(-1)[kept].sum()), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_each_token_has_the_context_of_its_window(stride, batch):
    model, tokens = RunningSum(), some_tokens(60)
    nats, count = evaluate_tokens(
        model, tokens, context_length=7, stride=stride, batch_size=batch, eos_id=EOS
    )
    assert count == 60
    assert nats == pytest.approx(brute_force(model, tokens, 7, 7 - stride + 1), rel=1e-6)


def test_stride_one_gives_every_token_the_full_context():
    model, tokens = RunningSum(), some_tokens(40)
    stream = torch.from_numpy(np.concatenate(([EOS], tokens)))
    expected = 0.0
    for i, target in enumerate(tokens):
        logits, _ = model(stream[max(0, i - 9) : i + 1][None])
        expected -= logits[0, -1].log_softmax(-1)[target].item()
    nats, _ = evaluate_tokens(model, tokens, context_length=10, stride=1, batch_size=8, eos_id=EOS)
    assert nats == pytest.approx(expected, rel=1e-6)


def test_a_carried_state_equals_one_window_over_everything():
    model, tokens = RunningSum(), some_tokens(101)
    whole, _ = evaluate_tokens(model, tokens, context_length=101, eos_id=EOS)
    model.lengths.clear()
    carried, count = evaluate_tokens(model, tokens, context_length=8, eos_id=EOS, carry_state=True)
    assert (count, carried) == (101, pytest.approx(whole, rel=1e-6))
    assert model.lengths == [8] * 12 + [5]
    apart, _ = evaluate_tokens(model, tokens, context_length=8, eos_id=EOS)
    assert abs(apart - whole) > 1
    # A last window that began earlier would read, and carry on, what was read already.
    full, _ = evaluate_tokens(model, tokens, context_length=8, eos_id=EOS, carry_state=True, full_last=True)
    assert full == pytest.approx(whole, rel=1e-6)


def test_windows_of_one_shape_share_a_batch():
    model = RunningSum()
    evaluate_tokens(model, some_tokens(100), context_length=10, batch_size=4, eos_id=EOS)
    assert model.lengths == [10, 10, 10]


def test_bfloat16_autocast_is_applied_and_stays_close():
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(VOCABULARY, 64), nn.Linear(64, VOCABULARY)

        def forward(self, tokens: Tensor, state: list | None = None) -> tuple[Tensor, list]:
            return self.head(self.embedding(tokens)), []

    model, tokens = Small(), some_tokens(500)
    exact, _ = evaluate_tokens(model, tokens, context_length=16, eos_id=EOS)
    rough, _ = evaluate_tokens(model, tokens, context_length=16, eos_id=EOS, autocast=torch.bfloat16)
    assert rough != exact
    assert rough == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(training):
    model = RunningSum().train(training)
    evaluate_tokens(model, some_tokens(5), context_length=4, eos_id=EOS)
    assert model.training is training


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"stride": 9}, "stride 9: must be from 1 to the context length, 8"),
        ({"stride": 0}, "stride 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"limit": 0}, "no tokens"),
    ],
)
def test_lengths_out_of_range_are_refused(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        evaluate_tokens(RunningSum(), some_tokens(20), **{"context_length": 8, "eos_id": EOS, **changes})


def test_result_converts_nats_to_the_units_of_the_field():
    result = LanguageModelResult.from_sum(
        200 * math.log(2), 100, split_tokens=100, split_bytes=400, split_characters=250
    )
    assert result.loss == pytest.approx(2 * math.log(2))
    assert result.perplexity == pytest.approx(4)
    assert result.bits_per_byte == pytest.approx(0.5)
    assert result.bits_per_character == pytest.approx(0.8)
    assert (result.tokens, result.bytes, result.characters) == (100, 400, 250)


def test_part_of_a_split_is_charged_its_share_of_the_bytes():
    result = LanguageModelResult.from_sum(
        50 * math.log(2), 25, split_tokens=100, split_bytes=400, split_characters=200
    )
    assert (result.bytes, result.characters) == (100, 50)
    assert result.bits_per_byte == pytest.approx(0.5)
