"""What the judge makes of losses and gradients."""

import json
import math

import pytest

from spikescale.config import FaultConfig
from spikescale.faults.anomalies import Judge

INF, NAN = math.inf, math.nan


def settle(judge, loss, norm=None):
    return judge.take(loss, judge.look_at(loss, norm))


def filled(count=20, **settings):
    judge = Judge(FaultConfig(**settings))
    for step in range(count):
        assert settle(judge, 3.0 + 0.01 * (step % 5)).action == "use"
    return judge


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (NAN, None, "the loss is nan"),
        (INF, 1.0, "the loss is inf"),
        (3.0, INF, "the gradient norm is inf"),
        (3.0, NAN, "the gradient norm is nan"),
    ],
)
def test_what_is_no_number_is_dropped(loss, norm, reason):
    verdict = settle(filled(), loss, norm)
    assert (verdict.action, verdict.reason) == ("drop", reason)


def test_only_a_row_of_dropped_steps_leads_to_a_roll_back():
    judge = filled(nonfinite_limit=3)
    actions = [settle(judge, loss).action for loss in (NAN, NAN, 3.0, NAN, NAN, NAN)]
    assert actions == ["drop", "drop", "use", "drop", "drop", "roll-back"]
    assert (judge.dropped_steps, judge.bad_in_a_row) == (5, 3)


@pytest.mark.parametrize(
    ("action", "expected"), [("off", "use"), ("warn", "use"), ("skip", "drop"), ("roll-back", "roll-back")]
)
def test_a_spike_is_treated_as_asked(action, expected):
    verdict = settle(filled(spike_action=action), 4.0)
    assert verdict.action == expected
    assert bool(verdict.reason) == (action != "off")


def test_the_score_is_in_robust_deviations_and_no_outlier_moves_it_much():
    judge = filled(count=21)
    # The losses are 3.00 to 3.04 in equal shares: median 3.02, median absolute deviation 0.01.
    assert judge.score(3.5) == pytest.approx(0.48 / 0.014826, rel=1e-6)
    before = judge.score(3.2)
    settle(judge, 1000.0)
    assert judge.score(3.2) == pytest.approx(before, rel=0.2)
    assert judge.score(2.0) < 0


def test_nothing_is_a_spike_before_eight_losses_are_known():
    judge = filled(count=7)
    assert judge.score(100.0) is None
    settle(judge, 3.0)
    assert judge.score(100.0) > 100


def test_skipped_spikes_do_not_become_the_measure_of_later_ones():
    judge = filled(spike_action="skip", nonfinite_limit=10)
    assert [settle(judge, 5.0).action for _ in range(5)] == ["drop"] * 5
    assert settle(judge, 3.02).action == "use"


def test_a_judge_restored_from_json_judges_alike():
    judge, other = filled(spike_action="skip"), Judge(FaultConfig(spike_action="skip"))
    settle(judge, NAN)
    other.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    for loss in (3.01, NAN, 3.3, 9.0):
        assert settle(judge, loss) == settle(other, loss)
    assert judge.state_dict() == other.state_dict()


def test_a_roll_back_takes_the_losses_back_and_keeps_the_counts():
    judge = filled(nonfinite_limit=2)
    state = json.loads(json.dumps(judge.state_dict()))
    assert [settle(judge, NAN).action for _ in range(2)] == ["drop", "roll-back"]
    judge.rolled_back(state)
    assert (judge.rollbacks, judge.dropped_steps, judge.bad_in_a_row) == (1, 2, 0)
    assert list(judge.losses) == state["losses"]
