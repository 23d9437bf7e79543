"""All fits to one family's points, with intervals, validation and warnings, as one result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spikescale.errors import UserError
from spikescale.scaling import checks
from spikescale.scaling.approaches import (
    Optimum,
    PowerLaws,
    Profile,
    envelope,
    has_curves,
    inside,
    optima_of,
    power_laws,
    profiles,
)
from spikescale.scaling.bootstrap import Interval, Resampling, predicted, resampled, resampled_laws
from spikescale.scaling.forms import FORMS, Array
from spikescale.scaling.parametric import DELTA, Data, Fitted, fit_form
from spikescale.scaling.points import Count, Point, final_points

BLANK = Interval(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class Options:
    """How to fit."""

    count: Count = "total"
    forms: Sequence[str] = ("chinchilla", "kaplan")
    approaches: Sequence[int] = (1, 2, 3)
    delta: float = DELTA
    rounds: int = 200
    confidence: float = 0.9
    resampling: Resampling = "noise"
    seed: int = 0


@dataclass(frozen=True)
class Validation:
    """The largest model predicted from all others. errors: log of measured over predicted loss, (P,)."""

    left_out: float  # its parameters
    points: tuple[Point, ...]
    predicted: tuple[Interval, ...]

    @property
    def errors(self) -> Array:
        """log of measured over predicted."""
        return np.log([p.loss / i.value for p, i in zip(self.points, self.predicted, strict=True)])

    @property
    def inside(self) -> int:
        """How many of them lie in their interval."""
        return sum(i.low <= p.loss <= i.high for p, i in zip(self.points, self.predicted, strict=True))


@dataclass(frozen=True)
class FormResult:
    """Approach 3 with one form. Where the points do not determine it, all values and limits are NaN."""

    fitted: Fitted
    thetas: Array  # (rounds, K)
    data: Data
    confidence: float
    parameters: dict[str, Interval]
    exponent: Interval  # a of N_opt ~ C^a
    condition: float
    validation: Validation | None
    warnings: list[str]
    determined: bool = True

    def predict(self, sizes: Array, tokens: Array, noise: bool = False) -> list[Interval]:
        """The loss at sizes and tokens; with `noise` the interval is that of a single run."""
        if not self.determined:
            return [BLANK] * len(sizes)
        return predicted(self.fitted, self.thetas, sizes, tokens, self.confidence, noise)

    def best_size(self, flop: Array) -> list[Interval]:
        """N_opt at each FLOP."""
        if not self.determined:
            return [BLANK] * len(flop)
        form, centre, factor = self.fitted.form, self.fitted.centre, self.data.flop_factor
        best = form.best_size(self.fitted.theta, centre, flop, factor)
        drawn = np.stack([form.best_size(theta, centre, flop, factor) for theta in self.thetas])
        return [Interval.of(float(b), d, self.confidence) for b, d in zip(best, drawn.T, strict=True)]


@dataclass(frozen=True)
class LawResult:
    """Approach 1 or 2."""

    optima: list[Optimum]
    laws: PowerLaws | None
    a: Interval | None
    b: Interval | None
    warnings: list[str]
    profiles: list[Profile] = field(default_factory=list)


@dataclass(frozen=True)
class FamilyFit:
    """Everything fitted to one family."""

    family: str
    points: list[Point]
    options: Options
    warnings: list[str]
    forms: dict[str, FormResult]
    approach1: LawResult | None
    approach2: LawResult | None


def rounds_of(options: Options) -> int:
    """Bootstrap rounds that a fit of one family takes, for a progress bar."""
    approach3 = len(options.forms) * 2 if 3 in options.approaches else 0
    return options.rounds * (approach3 + (1 in options.approaches) + (2 in options.approaches))


def fit_family(
    family: str, points: Sequence[Point], options: Options, progress: Callable[[], None] = lambda: None
) -> FamilyFit:
    """Fit what `options` ask for. Raises UserError for points that nothing can be fitted to."""
    finals = final_points(points)
    if not finals:
        raise UserError(f"{family or 'points'}: no finished run among {len(points)} points")
    data = Data.of(finals, options.count)
    forms: dict[str, FormResult] = {}
    if 3 in options.approaches:
        for name in options.forms:
            forms[name] = _form_result(name, finals, data, options, progress)
    most = max((len(FORMS[name].symbols) for name in options.forms), default=1)
    return FamilyFit(
        family,
        list(points),
        options,
        checks.check_data(data, finals, most),
        forms,
        _approach1(points, options, progress) if 1 in options.approaches else None,
        _approach2(points, options, progress) if 2 in options.approaches else None,
    )


def _form_result(
    name: str, finals: Sequence[Point], data: Data, options: Options, progress: Callable[[], None]
) -> FormResult:
    form = FORMS[name]
    fitted = fit_form(form, data, options.delta)
    reason = checks.undetermined(fitted, data)
    if reason is not None:
        return FormResult(
            fitted,
            np.empty((0, len(form.symbols))),
            data,
            options.confidence,
            dict.fromkeys(form.symbols, BLANK),
            BLANK,
            fitted.condition(data),
            None,
            [reason],
            determined=False,
        )
    thetas = resampled(
        fitted, data, options.rounds, options.delta, options.seed, options.resampling, progress
    )
    drawn = [form.natural(theta, fitted.centre) for theta in thetas]
    intervals = {
        symbol: Interval.of(value, np.array([d[symbol] for d in drawn]), options.confidence)
        for symbol, value in fitted.natural.items()
    }
    exponent = Interval.of(
        form.exponents(fitted.theta)[0],
        np.array([form.exponents(theta)[0] for theta in thetas]),
        options.confidence,
    )
    return FormResult(
        fitted,
        thetas,
        data,
        options.confidence,
        intervals,
        exponent,
        fitted.condition(data),
        validate(name, finals, options, progress),
        checks.check_fit(fitted, data),
    )


def validate(
    name: str, finals: Sequence[Point], options: Options, progress: Callable[[], None] = lambda: None
) -> Validation | None:
    """Leave the largest model out, fit the others, predict it; None when too little would be left."""
    form = FORMS[name]
    largest = max(point.size(options.count) for point in finals)
    left = [point for point in finals if point.size(options.count) == largest]
    kept = [point for point in finals if point.size(options.count) != largest]
    if len(kept) <= len(form.symbols) or len({point.size(options.count) for point in kept}) < 3:
        return None
    data = Data.of(kept, options.count)
    fitted = fit_form(form, data, options.delta)
    if checks.undetermined(fitted, data) is not None:
        return None
    thetas = resampled(
        fitted, data, options.rounds, options.delta, options.seed + 1, options.resampling, progress
    )
    sizes, tokens = np.array([[p.size(options.count), p.tokens] for p in left]).T
    intervals = predicted(fitted, thetas, sizes, tokens, options.confidence, True, options.seed)
    return Validation(largest, tuple(left), tuple(intervals))


def _law_result(
    points: Sequence[Point],
    optima: list[Optimum],
    fit: Callable[[Sequence[Point]], PowerLaws | None],
    warnings: list[str],
    options: Options,
    progress: Callable[[], None],
    found: list[Profile] | None = None,
) -> LawResult:
    laws = fit(points)
    if laws is None:
        return LawResult(
            optima,
            None,
            None,
            None,
            [*warnings, "no power law: fewer than two optima lie within the sizes tried"],
            found or [],
        )
    drawn = resampled_laws(points, fit, options.rounds, options.seed, progress)
    a = Interval.of(laws.a, np.array([d.a for d in drawn]), options.confidence)
    b = Interval.of(laws.b, np.array([d.b for d in drawn]), options.confidence)
    if len(drawn) < options.rounds / 2:
        warnings = [*warnings, f"only {len(drawn)} of {options.rounds} resamples left a power law to fit"]
    return LawResult(optima, laws, a, b, warnings, found or [])


def _approach1(points: Sequence[Point], options: Options, progress: Callable[[], None]) -> LawResult:
    optima = envelope(points, options.count)
    warnings = checks.check_envelope(optima, not has_curves(points))

    def fit(chosen: Sequence[Point]) -> PowerLaws | None:
        return power_laws(inside(envelope(chosen, options.count)))

    return _law_result(points, optima, fit, warnings, options, progress)


def _approach2(points: Sequence[Point], options: Options, progress: Callable[[], None]) -> LawResult:
    finals = final_points(points)
    found = profiles(finals, options.count)
    optima = [profile.optimum() for profile in found if profile.convex]

    def fit(chosen: Sequence[Point]) -> PowerLaws | None:
        return power_laws(optima_of(profiles(chosen, options.count)))

    return _law_result(finals, optima, fit, checks.check_profiles(found), options, progress, found)


def as_json(result: FamilyFit) -> dict[str, Any]:
    """A family's fit for a JSON file."""
    forms = {}
    for name, form in result.forms.items():
        validation = form.validation
        forms[name] = {
            "parameters": {symbol: interval.as_dict() for symbol, interval in form.parameters.items()},
            "N_opt_exponent": form.exponent.as_dict(),
            "condition": form.condition if np.isfinite(form.condition) else None,
            "rms_log_residual": float(np.sqrt(np.mean(form.fitted.residuals**2))),
            "warnings": form.warnings,
            "leave_largest_out": None
            if validation is None
            else {
                "parameters": validation.left_out,
                "tokens": [point.tokens for point in validation.points],
                "measured": [point.loss for point in validation.points],
                "predicted": [interval.as_dict() for interval in validation.predicted],
                "log_errors": validation.errors.tolist(),
                "inside_interval": validation.inside,
            },
        }
    return {
        "points": len(final_points(result.points)),
        "warnings": result.warnings,
        "approach_1": _law_json(result.approach1),
        "approach_2": _law_json(result.approach2),
        "approach_3": forms,
    }


def predictions(result: FamilyFit, asked: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """For JSON: the loss of a single run at each asked (N, D), by form, with its interval."""
    rows: list[dict[str, Any]] = [{"parameters": size, "tokens": tokens} for size, tokens in asked]
    if asked:
        sizes, tokens = np.array(asked, dtype=np.float64).T
        for name, form in result.forms.items():
            for row, interval in zip(rows, form.predict(sizes, tokens, noise=True), strict=True):
                row[name] = interval.as_dict()
    return rows


def _law_json(result: LawResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {
        "a": result.a.as_dict() if result.a else None,
        "b": result.b.as_dict() if result.b else None,
        "G": float(np.exp(result.laws.log_g)) if result.laws else None,
        "optima": [vars(optimum) for optimum in result.optima]
        if len(result.optima) <= 20
        else len(result.optima),
        "warnings": result.warnings,
    }
