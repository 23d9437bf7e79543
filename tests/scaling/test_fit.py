"""Fits find the law that points were made from, and say when points cannot tell."""

import importlib
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import CHINCHILLA, KAPLAN, SIZES, chinchilla, grid, kaplan

from spikescale.errors import UserError
from spikescale.scaling import checks
from spikescale.scaling.approaches import envelope, optima_of, power_laws, profiles
from spikescale.scaling.bootstrap import Interval, resampled_laws
from spikescale.scaling.fit import Options, as_json, fit_family, predictions, validate
from spikescale.scaling.forms import FORMS
from spikescale.scaling.parametric import Data, fit_form, huber
from spikescale.scaling.points import Point, final_points


@pytest.mark.parametrize(
    ("name", "law", "truth"), [("chinchilla", chinchilla, CHINCHILLA), ("kaplan", kaplan, KAPLAN)]
)
def test_exact_points_give_the_law_they_were_made_from(name, law, truth):
    fitted = fit_form(FORMS[name], Data.of(grid(law), "total"))
    assert fitted.natural == pytest.approx(truth, rel=1e-3)
    assert np.abs(fitted.residuals).max() < 1e-6


@pytest.mark.parametrize("name", ["chinchilla", "kaplan"])
def test_derivatives_are_those_of_the_form(name):
    form = FORMS[name]
    theta = np.array([0.1, -0.4, 0.2, 0.35, 0.4]) if name == "chinchilla" else np.array([0.3, -0.5, 0.2, 0.4])
    n, d = np.linspace(-2, 2, 7), np.linspace(1, -1, 7)
    _, jacobian = form.log_loss(theta, n, d)
    for index in range(len(theta)):
        step = np.zeros_like(theta)
        step[index] = 1e-6
        slope = (form.log_loss(theta + step, n, d)[0] - form.log_loss(theta - step, n, d)[0]) / 2e-6
        assert jacobian[:, index] == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("name", ["chinchilla", "kaplan"])
def test_best_size_is_the_minimum_along_a_line_of_equal_flop(name):
    fitted = fit_form(FORMS[name], Data.of(grid(chinchilla if name == "chinchilla" else kaplan), "total"))
    flop = np.array([1e14])
    best = FORMS[name].best_size(fitted.theta, fitted.centre, flop, 6.0)
    around = best * np.geomspace(0.5, 2, 201)
    losses = fitted.log_loss(around, flop / (6 * around))
    assert around[np.argmin(losses)] == pytest.approx(best[0], rel=0.01)
    larger = FORMS[name].best_size(fitted.theta, fitted.centre, 10 * flop, 6.0)
    assert np.log10(larger / best)[0] == pytest.approx(FORMS[name].exponents(fitted.theta)[0])


def test_an_outlier_moves_the_fit_by_less_than_least_squares_would():
    points = grid(noise=0.001)
    points[7] = Point(points[7].parameters, points[7].tokens, points[7].loss * 1.3, points[7].flop)
    data = Data.of(points, "total")
    robust, square = (fit_form(FORMS["chinchilla"], data, delta).natural["alpha"] for delta in (1e-3, 10.0))
    assert abs(robust - CHINCHILLA["alpha"]) < 0.02 < abs(square - CHINCHILLA["alpha"])


def test_huber_is_square_inside_and_linear_outside():
    value, slope = huber(np.array([0.0005, -0.01]), 1e-3)
    assert value == pytest.approx(0.5 * 0.0005**2 / 1e-3 + 0.01 - 0.5e-3)
    assert slope == pytest.approx([0.5, -1.0])


def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch):
    # 90% intervals of 20 simulated ladders: fewer than 15 hits of a right interval have a chance of 1%.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    ladders = 20
    hits = importlib.import_module("fit_coverage").coverage(ladders, rounds=30, delta=1e-2)
    assert all(15 <= count <= ladders for count in hits.values()), hits
    assert sum(hits.values()) < 4 * ladders  # intervals that always hold would be too wide to say anything


def isoflop(noise=0.0, centre=1.0):
    """Five profiles of nine sizes around `centre` times the best one."""
    best = FORMS["chinchilla"]
    fitted = fit_form(best, Data.of(grid(), "total"))
    points = []
    generator = np.random.default_rng(3)
    for flop in np.geomspace(1e12, 1e14, 5):
        optimum = float(best.best_size(fitted.theta, fitted.centre, np.array([flop]), 6.0)[0])
        for factor in np.geomspace(0.25, 4, 9):
            n = centre * optimum * factor
            loss = chinchilla(n, flop / (6 * n)) * np.exp(noise * generator.standard_normal())
            points.append(Point(n, flop / (6 * n), float(loss), flop, budget=flop))
    return points


def test_parabolas_find_the_exponent_of_the_best_size():
    found = profiles(isoflop(), "total")
    assert len(found) == 5
    assert not any(profile.interpolated for profile in found)
    truth = CHINCHILLA["beta"] / (CHINCHILLA["alpha"] + CHINCHILLA["beta"])
    laws = power_laws(optima_of(found))
    assert laws.a == pytest.approx(truth, abs=0.01)
    assert laws.a + laws.b == pytest.approx(1, abs=0.02)
    assert checks.check_profiles(found) == []


def test_profiles_beside_their_minimum_are_warned_of():
    (warning,) = checks.check_profiles(profiles(isoflop(centre=3.0), "total"))
    assert warning.startswith("off centre: 5 of 5 minima")
    warnings = checks.check_profiles(profiles(isoflop(centre=6.0), "total"))
    assert any(warning.startswith("at the border") for warning in warnings)


def test_lengths_that_sizes_share_are_interpolated_to_profiles():
    found = profiles(grid(sizes=np.geomspace(5e4, 2e6, 12), tokens=np.geomspace(1e5, 3e8, 16)), "total")
    assert all(profile.interpolated for profile in found)
    inside = [profile.optimum() for profile in found if profile.convex and not profile.optimum().border]
    truth = fit_form(FORMS["chinchilla"], Data.of(grid(), "total"))
    for optimum in inside:
        best = truth.form.best_size(truth.theta, truth.centre, np.array([optimum.flop]), 6.0)[0]
        assert optimum.size == pytest.approx(best, rel=0.5)
    assert len(inside) >= 4


def test_envelope_of_training_curves_finds_the_exponent():
    points = [
        Point(n, d, float(chinchilla(n, d)), 6 * n * d, run=f"{n:.0f}")
        for n in np.geomspace(1e4, 1e7, 25)
        for d in np.geomspace(1e5, 1e9, 60)
    ]
    # A trunk, whose rate never decayed, is no training curve.
    trunk = [Point(3e5, d, 0.1, 6 * 3e5 * d, run="trunk", final=False) for d in np.geomspace(1e5, 1e9, 60)]
    optima = [optimum for optimum in envelope([*points, *trunk], "total") if not optimum.border]
    assert len(optima) > 50
    truth = CHINCHILLA["beta"] / (CHINCHILLA["alpha"] + CHINCHILLA["beta"])
    assert power_laws(optima).a == pytest.approx(truth, abs=0.03)


def test_largest_model_is_predicted_from_the_others():
    validation = validate("chinchilla", grid(noise=0.002), Options(rounds=40))
    assert validation.left_out == SIZES[-1]
    assert len(validation.points) == 5
    assert np.abs(validation.errors).max() < 0.01
    assert validation.inside >= 3
    other = [
        Point(p.parameters, p.tokens, p.loss * (1.1 if p.parameters == SIZES[-1] else 1), p.flop)
        for p in grid(noise=0.002)
    ]
    assert validate("chinchilla", other, Options(rounds=40)).inside == 0


def cross(loss, tokens=(1e6, 5e6), **more):
    """All sizes at a few numbers of tokens."""
    return [Point(n, d, loss, 6 * n * d, **more) for n, d in itertools.product(SIZES, tokens)]


def fixed_ratio(smallest, largest):
    return [
        Point(n, 20 * n, float(chinchilla(n, 20 * n)), 120 * n * n)
        for n in np.geomspace(smallest, largest, 20)
    ]


def uneven_flop():
    return [Point(n, d, 2.0, 6 * n**1.1 * d) for n, d in itertools.product(SIZES, [1e6, 5e6])]


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (grid(sizes=SIZES[:3], tokens=[1e6, 2e6]), ["too few: 6 points for 5", "too few: 3 different sizes"]),
        (grid(sizes=np.geomspace(1e5, 3e5, 6)), ["narrow: the sizes span a factor of 3"]),
        (fixed_ratio(1e4, 1e8), ["N and D go together"]),
        (cross(2.0, unique_tokens=1e6), ["up to 5.0 passes"]),
        (uneven_flop(), ["FLOP / (N D)"]),
    ],
)
def test_points_that_cannot_tell_are_warned_of(points, words):
    found = checks.check_data(Data.of(points, "total"), points, 5)
    for word in words:
        assert any(word in warning for warning in found), found


def test_good_points_are_not_warned_of_and_bad_condition_is():
    data = Data.of(grid(noise=0.001), "total")
    assert checks.check_data(data, grid(), 5) == []
    assert checks.check_fit(fit_form(FORMS["chinchilla"], data), data) == []
    data = Data.of(fixed_ratio(1e4, 1e7), "total")
    found = checks.check_fit(fit_form(FORMS["chinchilla"], data), data)
    assert any("ill-conditioned" in warning or "at the edge" in warning for warning in found)


def test_fewer_points_than_parameters_are_refused():
    with pytest.raises(UserError, match="5 parameters cannot be fitted to 4 points"):
        fit_family("a", grid()[:4], Options(rounds=5))


def test_infinite_samples_give_infinite_limits_and_no_nan():
    found = Interval.of(1.0, np.array([1.0, 2.0, 3.0, np.inf, np.inf, np.inf, np.nan]), 0.9)
    assert (found.low, found.high) == (1.0, np.inf)
    found = Interval.of(1.0, np.array([0.5, np.inf, np.inf]), 0.4)
    assert (found.low, found.high) == (0.5, np.inf)
    assert Interval.of(1.0, np.full(5, np.inf), 0.9).low == np.inf


@pytest.mark.parametrize("named", [True, False])
def test_what_a_resample_draws_twice_counts_twice_and_profiles_keep_their_number(named):
    points = [replace(p, run=f"r{i}" if named else "") for i, p in enumerate(isoflop())]
    seen = []

    def fit(chosen):
        seen.append(final_points(chosen))
        return power_laws(optima_of(profiles(chosen, "total")))

    resampled_laws(points, fit, 5, 0)
    assert len(seen) == 5
    for chosen in seen:
        assert Counter(p.budget for p in chosen) == Counter(p.budget for p in points)
        assert max(Counter((p.parameters, p.tokens) for p in chosen).values()) > 1


def test_curves_are_drawn_whole_and_lengths_drawn_twice_make_no_new_profile():
    curves = [Point(n, d, 2.0, 6 * n * d, run=f"{n:.0f}") for n in SIZES for d in (1e6, 2e6, 4e6)]
    seen = []
    resampled_laws(curves, seen.append, 4, 0)
    for chosen in seen:
        assert set(Counter(point.run for point in chosen).values()) == {3}
        assert len({point.run for point in chosen}) == len(SIZES)
        assert len({point.parameters for point in chosen}) < len(SIZES)
    once = profiles(grid(), "total")
    assert [p.flop for p in profiles(grid() * 2, "total")] == [p.flop for p in once]


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (grid(noise=0.003, tokens=[1e6, 2e6]), "undetermined: 2 different numbers of tokens, needs 3"),
        (grid(noise=0.003, sizes=SIZES[:2]), "undetermined: 2 different sizes, needs 3"),
    ],
)
def test_what_points_leave_open_is_left_blank(points, reason):
    result = fit_family("a", points, Options(rounds=3, approaches=(3,)))
    for form in as_json(result)["approach_3"].values():
        assert form["warnings"][0].startswith(reason)
        for interval in (*form["parameters"].values(), form["N_opt_exponent"]):
            assert interval == {"value": None, "low": None, "high": None}
        assert form["leave_largest_out"] is None
    (row,) = predictions(result, [(1e7, 1e8)])
    assert row["chinchilla"] == row["kaplan"] == {"value": None, "low": None, "high": None}
    (best,) = result.forms["chinchilla"].best_size(np.array([1e14]))
    assert np.isnan([best.value, best.low, best.high]).all()


def test_a_fit_whose_condition_explodes_is_left_blank(monkeypatch):
    data = Data.of(grid(noise=0.001), "total")
    fitted = fit_form(FORMS["chinchilla"], data)
    assert checks.undetermined(fitted, data) is None
    monkeypatch.setattr(checks, "UNDETERMINED_CONDITION", 10.0)
    assert "the condition number of the fit is" in checks.undetermined(fitted, data)
