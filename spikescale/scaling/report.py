"""The report of a ladder: one page, its pictures, and the files in MLflow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spikescale import pages
from spikescale.scaling import figures
from spikescale.scaling.fit import FamilyFit
from spikescale.scaling.fit_tables import all_warnings, between
from spikescale.scaling.forecast import Forecast, forecast
from spikescale.scaling.points import final_points
from spikescale.scaling.tables import compact
from spikescale.scaling.twin import Worth, worth


@dataclass(frozen=True)
class Content:
    """What the page shows. energy: rows (N, picojoules a token, twin's energy over it) by family."""

    title: str
    results: Sequence[FamilyFit]
    twin: str | None
    vocab_size: int
    budgets: Sequence[float]
    energy: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    origin: str = ""


def write_report(content: Content, path: Path) -> list[Path]:
    """Write the page and its pictures beside it; all files written."""
    pictures = pages.Pictures(path)
    results = content.results
    worths = _worths(content)
    found = _forecasts(content)
    sections = [
        _introduction(content),
        "<h2>Warnings</h2>" + _warnings(results),
        "<h2>Loss by size and tokens</h2>",
        pictures.show("curves", "loss against tokens", figures.curves(results)),
        "<p class=note>Dots are the ends of runs, lines the fitted law; faint dots are validation losses"
        " before a"
        " run's end, which no law is fitted to.</p>",
        "<h2>Fitted laws</h2>",
        _laws(results),
        pictures.show("intervals", "parameters with intervals", figures.intervals(results)),
        "<h2>Profiles of equal compute</h2>",
        pictures.show("isoflop", "isoFLOP parabolas", figures.isoflop(results))
        or "<p>None could be made.</p>",
        "<h2>Best size and tokens for a compute</h2>",
        _exponents(results),
        pictures.show("optima", "best N and D against FLOP", figures.optima(results)),
        "<h2>Residuals</h2>",
        pictures.show("residuals", "measured over fitted loss", figures.residuals(results)),
        "<h2>The largest model, predicted from the others</h2>",
        _validation(results),
        "<h2>Forecast</h2>",
        _forecast_table(content, found),
        pictures.show("forecast", "measured and forecast losses", figures.forecasts(found, results)),
        "<h2>Firing rate and energy against scale</h2>",
        pictures.show("firing", "firing rate and energy", figures.firing_and_energy(results, content.energy))
        or "<p>No neuron fires in these families.</p>",
        _energy_table(content),
    ]
    if content.twin is not None:
        sections += [
            f"<h2>Against {pages.text(content.twin)}, the twin without neurons</h2>",
            "<p>Effective parameters are those with which the twin's law gives the same loss on the same"
            " tokens.</p>",
            pictures.show("twin", "effective parameters over own", figures.twins(worths)),
            _worth_table(worths),
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pages.write_page(path, pages.text(content.title), sections)
    return [path, *pictures.written]


def _introduction(content: Content) -> str:
    rows = []
    for result in content.results:
        finals = final_points(result.points)
        sizes = [p.size(result.options.count) for p in finals]
        tokens = [p.tokens for p in finals]
        rows.append(
            [
                result.family,
                len(finals),
                f"{compact(min(sizes))} to {compact(max(sizes))}",
                f"{compact(min(tokens))} to {compact(max(tokens))}",
                f"{min(p.flop for p in finals):.2g} to {max(p.flop for p in finals):.2g}",
                f"{min(p.loss for p in finals):.3f} to {max(p.loss for p in finals):.3f}",
            ]
        )
    options = content.results[0].options
    return pages.table(["family", "runs", "N", "D", "FLOP", "loss"], rows) + (
        f"<p class=note>N is {options.count}; losses are nats a token of the validation split. Fits: Huber"
        f" loss of"
        f" log L, delta {options.delta:g}; intervals: {options.confidence:.0%}, {options.rounds} bootstrap"
        f" rounds"
        f" ({options.resampling}), seed {options.seed}. {pages.text(content.origin)}</p>"
    )


def _warnings(results: Sequence[FamilyFit]) -> str:
    items = [f"{result.family}: {warning}" for result in results for warning in all_warnings(result)]
    if not items:
        return "<p>None.</p>"
    return "<ul>" + "".join(f"<li>{pages.text(item)}</li>" for item in items) + "</ul>"


def _laws(results: Sequence[FamilyFit]) -> str:
    shown = []
    for result in results:
        for name, form in result.forms.items():
            values = ", ".join(f"{symbol} = {between(i)}" for symbol, i in form.parameters.items())
            rms = float(np.sqrt(np.mean(form.fitted.residuals**2)))
            shown.append([result.family, name, values, f"{rms:.2%}", f"{form.condition:.3g}"])
    return pages.table(["family", "form", "parameters", "rms residual", "condition"], shown)


def _exponents(results: Sequence[FamilyFit]) -> str:
    rows = []
    for result in results:
        for label, law in (("1, envelope", result.approach1), ("2, isoFLOP", result.approach2)):
            if law is not None:
                rows.append([result.family, label, between(law.a), between(law.b)])
        for name, form in result.forms.items():
            rows.append([result.family, f"3, {name}", between(form.exponent), "1 - a"])
    return pages.table(["family", "approach", "a (N_opt ~ C^a)", "b (D_opt ~ C^b)"], rows)


def _validation(results: Sequence[FamilyFit]) -> str:
    rows = []
    for result in results:
        for name, form in result.forms.items():
            if form.validation is None:
                continue
            for point, found, error in zip(
                form.validation.points, form.validation.predicted, form.validation.errors, strict=True
            ):
                size = compact(point.size(result.options.count))
                rows.append(
                    [
                        result.family,
                        name,
                        size,
                        compact(point.tokens),
                        f"{point.loss:.4f}",
                        between(found),
                        f"{error:+.2%}",
                    ]
                )
    if not rows:
        return "<p>Too few sizes to leave one out.</p>"
    return pages.table(["family", "form", "N", "D", "measured", "predicted", "error"], rows)


def _forecasts(content: Content) -> dict[str, list[Forecast]]:
    found = {}
    for result in content.results:
        form = figures.main_form(result)
        if form is not None:
            finals = final_points(result.points)
            found[result.family] = forecast(
                form, finals, content.vocab_size, result.options.count, content.budgets
            )
    return found


def _forecast_table(content: Content, found: dict[str, list[Forecast]]) -> str:
    rows = [
        [
            family,
            each.preset,
            compact(each.size),
            f"{each.flop:.2g}",
            compact(each.tokens),
            between(each.loss),
            f"{each.beyond:.2g}x",
        ]
        for family, listed in found.items()
        for each in listed
    ]
    heads = ["family", "shape", "N", "FLOP", "D", "loss of a run", "FLOP beyond the points"]
    return pages.table(heads, rows) + (
        f"<p class=note>The presets with the ladder's vocabulary of {content.vocab_size} symbols and on its"
        f" text. An"
        " interval holds what the scatter of the points leaves open under this form. It knows nothing of"
        " another form"
        " being right, of a learning rate that stops being the best, or of text that runs out: far beyond"
        " the points"
        " these are what matters.</p>"
    )


def _energy_table(content: Content) -> str:
    rows = [
        [family, compact(size), f"{picojoules / 1e6:.4g}", f"{ratio:.3f}"]
        for family, listed in content.energy.items()
        for size, picojoules, ratio in sorted(listed)
    ]
    if not rows:
        return "<p class=note>Energy was not counted: it needs the models (--plan).</p>"
    return pages.table(["family", "N", "microjoule a token", "twin's energy over it"], rows)


def _worths(content: Content) -> dict[str, list[Worth]]:
    by_name = {result.family: result for result in content.results}
    twin = figures.main_form(by_name[content.twin]) if content.twin in by_name else None
    if twin is None or not twin.determined:
        return {}
    return {
        result.family: worth(result.points, twin, result.options.count)
        for result in content.results
        if result.family != content.twin
    }


def _worth_table(found: dict[str, list[Worth]]) -> str:
    rows = [
        [
            family,
            compact(each.size),
            compact(each.tokens),
            f"{each.loss:.4f}",
            between(each.ratio),
            "outside" if each.outside else "",
        ]
        for family, listed in found.items()
        for each in listed
    ]
    heads = ["family", "N", "D", "loss", "effective parameters over own", "twins trained"]
    count = sum(each.outside for listed in found.values() for each in listed)
    note = ""
    if count:
        note = (
            f"<p class=note>Of {len(rows)} models {count} are worth fewer or more parameters than any twin"
            f" that was"
            " trained has (outside): their ratios rest on the form of the law beyond its points.</p>"
        )
    return pages.table(heads, rows) + note


def log_to_mlflow(
    files: Sequence[Path], figures_of: dict[str, float], uri: str, experiment: str, run: str | None
) -> str:
    """Put files and figures into an MLflow run (a new one for None); its id. Raises UserError."""
    from spikescale.errors import UserError
    from spikescale.tracking.delivery import one_line
    from spikescale.tracking.mlflow_store import open_client, probe, shown

    try:
        probe(uri)
        client: Any = open_client(uri)
        if run is None:
            known = client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else client.create_experiment(experiment)
            run = str(client.create_run(number, run_name="scaling report").info.run_id)
        for file in files:
            client.log_artifact(run, str(file), "report")
        for key, value in figures_of.items():
            client.log_metric(run, key, value)
        client.set_terminated(run)
    except Exception as error:  # whatever a store or the network throws
        raise UserError(f"MLflow at {shown(uri)}: the report was not logged ({one_line(error)})") from None
    return run
