"""A fit as tables for the terminal."""

import sys
from collections.abc import Sequence

import numpy as np

from spikescale.scaling.bootstrap import Interval
from spikescale.scaling.fit import FamilyFit, FormResult, LawResult
from spikescale.scaling.points import final_points
from spikescale.scaling.tables import compact, show_table


def between(interval: Interval | None) -> str:
    """`0.34 (0.31 to 0.38)`; `-` for what is not known."""
    if interval is None or np.isnan(interval.value):
        return "-"
    return f"{interval.value:.4g} ({interval.low:.4g} to {interval.high:.4g})"


def show_fit(result: FamilyFit, asked: Sequence[tuple[float, float]]) -> None:
    """Print parameters, exponents, validation, predictions at `asked` (N, D), and warnings."""
    name = result.family or "points"
    finals = final_points(result.points)
    losses = [point.loss for point in finals]
    print(
        f"{name}: {len(finals)} runs, {len(result.points) - len(finals)} points of curves, losses"
        f" {min(losses):.3f} to {max(losses):.3f}; N is {result.options.count}, intervals are"
        f" {result.options.confidence:.0%}"
    )
    for form_name, form in result.forms.items():
        _show_form(f"{name}: {form_name}", form)
    rows = [
        [label, between(law.a), between(law.b), str(len(law.optima))]
        for label, law in (("1, envelope", result.approach1), ("2, isoFLOP", result.approach2))
        if law is not None
    ]
    rows += [
        [f"3, {form_name}", between(form.exponent), between(_rest(form.exponent)), "-"]
        for form_name, form in result.forms.items()
    ]
    if rows:
        show_table(f"{name}: N_opt ~ C^a, D_opt ~ C^b", ["approach", "a", "b", "optima"], rows)
    if asked:
        _show_predictions(name, result, asked)
    _warn(name, result)


def _rest(a: Interval) -> Interval:
    return Interval(1 - a.value, 1 - a.high, 1 - a.low)


def _show_form(title: str, form: FormResult) -> None:
    rows = [[symbol, between(interval)] for symbol, interval in form.parameters.items()]
    rows.append(["rms of log residuals", f"{np.sqrt(np.mean(form.fitted.residuals**2)):.4g}"])
    rows.append(["condition number", f"{form.condition:.3g}"])
    validation = form.validation
    if validation is not None:
        worst = validation.errors[np.argmax(np.abs(validation.errors))]
        rows.append(
            [
                f"largest left out ({compact(validation.left_out)})",
                f"{len(validation.points)} losses predicted, error up to {worst:+.2%}, {validation.inside} in"
                " their interval",
            ]
        )
    show_table(title, ["parameter", "value"], rows, left=2)


def _show_predictions(name: str, result: FamilyFit, asked: Sequence[tuple[float, float]]) -> None:
    sizes, tokens = np.array(asked, dtype=np.float64).T
    columns = {form_name: form.predict(sizes, tokens, noise=True) for form_name, form in result.forms.items()}
    rows = [
        [compact(size), compact(count), *(between(intervals[index]) for intervals in columns.values())]
        for index, (size, count) in enumerate(asked)
    ]
    show_table(f"{name}: predicted loss of a run", ["N", "D", *columns], rows)


def _warn(name: str, result: FamilyFit) -> None:
    for warning in all_warnings(result):
        print(f"warning: {name}: {warning}", file=sys.stderr)


def all_warnings(result: FamilyFit) -> list[str]:
    """Every warning, with what it is about in front."""
    found = list(result.warnings)
    for form_name, form in result.forms.items():
        found += [f"{form_name}: {warning}" for warning in form.warnings]
    laws: tuple[tuple[str, LawResult | None], ...] = (
        ("approach 1", result.approach1),
        ("approach 2", result.approach2),
    )
    for label, law in laws:
        if law is not None:
            found += [f"{label}: {warning}" for warning in law.warnings]
    return found
