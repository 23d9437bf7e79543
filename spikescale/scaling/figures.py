"""The report's pictures, each a PNG in memory."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spikescale.scaling.fit import FamilyFit, FormResult
from spikescale.scaling.forecast import PRESETS, Forecast
from spikescale.scaling.points import final_points
from spikescale.scaling.tables import compact
from spikescale.scaling.twin import Worth

WIDTH = 11.0  # inches
DPI = 110
MAIN_FORM = "chinchilla"
MARKERS = dict(zip(PRESETS, ("s", "D", "^"), strict=True))


def main_form(result: FamilyFit) -> FormResult | None:
    """The form that pictures and forecasts rest on."""
    return result.forms.get(MAIN_FORM) or next(iter(result.forms.values()), None)


def _drawn(
    rows: int, columns: int, height: float, draw: Callable[[Any], None], sharey: bool = False
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    draw(axes)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _colours(values: Sequence[float]) -> dict[float, Any]:
    from matplotlib import colormaps

    ordered = sorted(set(values))
    return {
        value: colormaps["viridis"](0.92 * i / max(len(ordered) - 1, 1)) for i, value in enumerate(ordered)
    }


def curves(results: Sequence[FamilyFit]) -> bytes:
    """Loss against tokens by size: the ends of runs, their training curves, and the fitted law."""

    def draw(axes: Any) -> None:
        for axis, result in zip(axes[0], results, strict=True):
            finals = final_points(result.points)
            count = result.options.count
            colours = _colours([p.size(count) for p in finals])
            form = main_form(result)
            for size, colour in colours.items():
                mine = sorted((p for p in finals if p.size(count) == size), key=lambda p: p.tokens)
                axis.loglog(
                    [p.tokens for p in mine], [p.loss for p in mine], "o", color=colour, label=compact(size)
                )
                others = sorted(
                    (p for p in result.points if p.size(count) == size and not p.final),
                    key=lambda p: p.tokens,
                )
                axis.loglog(
                    [p.tokens for p in others], [p.loss for p in others], ".", color=colour, alpha=0.4
                )
                if form is not None:
                    tokens = np.geomspace(min(p.tokens for p in finals), max(p.tokens for p in finals), 60)
                    fitted = np.exp(form.fitted.log_loss(np.full_like(tokens, size), tokens))
                    axis.loglog(tokens, fitted, color=colour, linewidth=1)
            axis.set(title=result.family or "points", xlabel="tokens", ylabel="loss, nats a token")
            axis.legend(title="N", fontsize=7)

    return _drawn(1, len(results), 4.6, draw, sharey=True)


def isoflop(results: Sequence[FamilyFit]) -> bytes | None:
    """Losses at equal FLOP against size, with their parabolas and minima."""
    shown = [r for r in results if r.approach2 and r.approach2.profiles]
    if not shown:
        return None

    def draw(axes: Any) -> None:
        for axis, result in zip(axes[0], shown, strict=True):
            assert result.approach2 is not None
            colours = _colours([profile.flop for profile in result.approach2.profiles])
            for profile in result.approach2.profiles:
                colour = colours[profile.flop]
                axis.semilogx(profile.sizes, profile.losses, "o", color=colour, label=f"{profile.flop:.2g}")
                x = np.linspace(np.log(profile.sizes.min()) - 0.3, np.log(profile.sizes.max()) + 0.3, 80)
                axis.semilogx(np.exp(x), np.polyval(profile.parabola, x - profile.centre), color=colour, lw=1)
                if profile.convex and not profile.optimum().border:
                    best = profile.optimum()
                    axis.plot([best.size], [best.loss], "*", color="crimson", markersize=11)
            axis.set(title=result.family or "points", xlabel="N", ylabel="loss, nats a token")
            axis.legend(title="FLOP", fontsize=7)

    return _drawn(1, len(shown), 4.4, draw)


def optima(results: Sequence[FamilyFit]) -> bytes:
    """N_opt and D_opt against compute: approaches 1 and 2 as points and lines, 3 with its interval."""

    def draw(axes: Any) -> None:
        for column, result in enumerate(results):
            flops = np.array([point.flop for point in final_points(result.points)])
            flop = np.geomspace(flops.min(), flops.max(), 40)
            size_axis, token_axis = axes[0][column], axes[1][column]
            for label, law, colour in (
                ("1, envelope", result.approach1, "C0"),
                ("2, isoFLOP", result.approach2, "C1"),
            ):
                if law is None or law.laws is None:
                    continue
                for axis, values, line in (
                    (size_axis, [o.size for o in law.optima], law.laws.size(flop)),
                    (token_axis, [o.tokens for o in law.optima], law.laws.tokens(flop)),
                ):
                    axis.loglog([o.flop for o in law.optima], values, ".", color=colour, alpha=0.5)
                    axis.loglog(flop, line, color=colour, label=label)
            form = result.forms.get(MAIN_FORM)
            if form is not None:
                best = form.best_size(flop)
                factor = form.data.flop_factor
                middle = np.array([i.value for i in best])
                low, high = np.array([i.low for i in best]), np.array([i.high for i in best])
                size_axis.loglog(flop, middle, color="C2", label="3, parametric")
                size_axis.fill_between(flop, low, high, color="C2", alpha=0.2)
                token_axis.loglog(flop, flop / (factor * middle), color="C2", label="3, parametric")
                token_axis.fill_between(
                    flop, flop / (factor * high), flop / (factor * low), color="C2", alpha=0.2
                )
            size_axis.set(title=result.family or "points", ylabel="N_opt")
            token_axis.set(xlabel="FLOP", ylabel="D_opt, tokens")
            size_axis.legend(fontsize=8)

    return _drawn(2, len(results), 3.6, draw)


def residuals(results: Sequence[FamilyFit]) -> bytes:
    """Measured over fitted loss, against size; colour is the number of tokens."""

    def draw(axes: Any) -> None:
        for column, result in enumerate(results):
            finals = final_points(result.points)
            for row, (name, form) in enumerate(result.forms.items()):
                axis = axes[row][column]
                shown = axis.scatter(
                    form.data.sizes,
                    100 * np.expm1(form.fitted.residuals),
                    c=np.log10([p.tokens for p in finals]),
                )
                axis.axhline(0, color="grey", linewidth=1)
                axis.set(
                    xscale="log",
                    title=f"{result.family}: {name}",
                    xlabel="N",
                    ylabel="measured over fitted, %",
                )
                axis.figure.colorbar(shown, ax=axis, label="log10 tokens")

    return _drawn(max(len(r.forms) for r in results), len(results), 3.2, draw)


def intervals(results: Sequence[FamilyFit]) -> bytes:
    """The parameters of the form that forecasts rest on, with their intervals."""
    symbols = ("E", "alpha", "beta", "a")

    def draw(axes: Any) -> None:
        for axis, symbol in zip(axes[0], symbols, strict=True):
            for place, result in enumerate(results):
                form = result.forms.get(MAIN_FORM)
                if form is None:
                    continue
                found = form.exponent if symbol == "a" else form.parameters[symbol]
                axis.errorbar(
                    [found.value],
                    [place],
                    xerr=[[max(found.value - found.low, 0)], [max(found.high - found.value, 0)]],
                    fmt="o",
                    capsize=4,
                )
            axis.set(title="a of N_opt ~ C^a" if symbol == "a" else symbol, ylim=(-0.6, len(results) - 0.4))
            axis.set_yticks(range(len(results)), [result.family for result in results])

    return _drawn(1, len(symbols), 2.2, draw)


def forecasts(found: dict[str, list[Forecast]], results: Sequence[FamilyFit]) -> bytes | None:
    """Predicted losses of the presets beside the measured ones, against compute."""
    if not any(found.values()):
        return None

    def draw(axes: Any) -> None:
        axis = axes[0][0]
        for index, result in enumerate(results):
            finals = final_points(result.points)
            axis.loglog(
                [p.flop for p in finals],
                [p.loss for p in finals],
                ".",
                color=f"C{index}",
                label=result.family,
            )
            for each in found.get(result.family, []):
                low, high = each.loss.value - each.loss.low, each.loss.high - each.loss.value
                axis.errorbar(
                    [each.flop * 1.06**index],
                    [each.loss.value],
                    yerr=[[max(low, 0)], [max(high, 0)]],
                    fmt=MARKERS[each.preset],
                    color=f"C{index}",
                    capsize=3,
                    alpha=0.8,
                )
        for preset, marker in MARKERS.items():
            axis.plot([], [], marker, color="grey", label=preset)
        axis.set(xlabel="FLOP", ylabel="loss, nats a token", title="measured (dots) and forecast")
        axis.legend(fontsize=8)

    return _drawn(1, 1, 4.2, draw)


def firing_and_energy(
    results: Sequence[FamilyFit], energy: dict[str, list[tuple[float, float, float]]]
) -> bytes | None:
    """Firing rates against size by tokens; picojoules a token, and over the twin's, where they were"
    " counted."""
    firing = [r for r in results if any(p.firing_rate is not None for p in final_points(r.points))]
    if not firing and not energy:
        return None

    def draw(axes: Any) -> None:
        rates, joules, ratios = axes[0]
        for result in firing:
            finals = [p for p in final_points(result.points) if p.firing_rate is not None]
            count = result.options.count
            colours = _colours([p.tokens for p in finals])
            for tokens, colour in colours.items():
                mine = sorted((p for p in finals if p.tokens == tokens), key=lambda p: p.size(count))
                rates.semilogx(
                    [p.size(count) for p in mine],
                    [p.firing_rate for p in mine],
                    "o-",
                    color=colour,
                    label=f"{result.family}, {compact(tokens)} tokens",
                )
        rates.set(title="firing rate", xlabel="N", ylabel="spikes a token and neuron", ylim=(0, None))
        if firing:
            rates.legend(fontsize=7)
        for family, rows in energy.items():
            sizes, picojoules, over = np.array(sorted(rows)).T
            joules.loglog(sizes, picojoules / 1e6, "o-", label=family)
            ratios.semilogx(sizes, over, "o-", label=family)
        joules.set(title="energy, counted operations", xlabel="N", ylabel="microjoule a token")
        ratios.set(title="twin's energy over the model's", xlabel="N", ylabel="times")
        for axis in (joules, ratios):
            if energy:
                axis.legend(fontsize=7)
            else:
                axis.text(0.5, 0.5, "not counted", ha="center", transform=axis.transAxes)

    return _drawn(1, 3, 3.6, draw)


def twins(found: dict[str, list[Worth]]) -> bytes | None:
    """Effective parameters over own ones, against size, by tokens."""
    finite = {family: [w for w in rows if 0 < w.ratio.value < float("inf")] for family, rows in found.items()}
    if not any(finite.values()):
        return None

    def draw(axes: Any) -> None:
        axis = axes[0][0]
        for rows in finite.values():
            colours = _colours([w.tokens for w in rows])
            for tokens, colour in colours.items():
                mine = [w for w in rows if w.tokens == tokens]
                middle = np.array([w.ratio.value for w in mine])
                low = np.clip(middle - np.array([w.ratio.low for w in mine]), 0, None)
                high = np.array([min(w.ratio.high, 10 * w.ratio.value) for w in mine]) - middle
                axis.errorbar(
                    [w.size for w in mine],
                    middle,
                    yerr=[low, np.clip(high, 0, None)],
                    fmt="o-",
                    color=colour,
                    capsize=3,
                    label=f"{compact(tokens)} tokens",
                )
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="N", ylabel="effective parameters over own")
        axis.legend(fontsize=8)

    return _drawn(1, 1, 3.8, draw)
