"""`spikescale analyze`: one HTML page about a model's neurons, its pictures, and the numbers as JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikescale.analysis import plots
from spikescale.analysis.collect import Analysis
from spikescale.analysis.statistics import DETAIL_TOKENS, OUTLIER_DEVIATIONS, LayerStatistics
from spikescale.files import write_json
from spikescale.pages import Pictures, table, text, write_page


def write_analysis(
    analysis: Analysis,
    folder: Path,
    facts: Mapping[str, Any],
    dead_rate: float = 0.0,
    saturated_rate: float = 0.95,
) -> list[Path]:
    """Write analysis.html, .json and the pictures to `folder`, and return their paths.

    `facts` are named values about model and text, shown at the top. A neuron that fires at no more than
    `dead_rate` of the tokens is dead, one that fires at no less than `saturated_rate` is saturated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / "analysis.html", folder / "analysis.json"
    pictures = Pictures(page)
    shown = plots.chosen(analysis.layers)
    some = (
        ""
        if len(shown) == len(analysis.layers)
        else f"<p class='note'>Shown are {len(shown)} of {len(analysis.layers)} layers, evenly spaced.</p>"
    )
    limits = (dead_rate, saturated_rate)
    sections = [
        table(("", ""), [(name, str(value)) for name, value in facts.items()]),
        "<h2>Firing rates</h2>"
        + pictures.show("rates", "firing rates by layer", plots.draw_rates(analysis, *limits))
        + _layers(analysis, *limits)
        + f"<p class='note'>Dead: fires at no more than {dead_rate:.0%} of the tokens. Saturated: at no less "
        f"than {saturated_rate:.0%}. Interval: tokens from one spike of a neuron to its next, in the same "
        "window; variation: their standard deviation over their mean, 1 if spikes come at random. Membranes "
        f"in thresholds; an outlier is more than {OUTLIER_DEVIATIONS:g} deviations from its neuron's "
        "mean as known so far.</p>",
        "<h2>SRWKV against SRFFN</h2><p>Neurons in and after TimeMix, and in and after ChannelMix.</p>"
        + pictures.show("subblocks", "SRWKV against SRFFN", plots.draw_subblocks(analysis)),
        "<h2>Neurons</h2><p>Rate of each neuron, in falling order.</p>"
        + some
        + pictures.show("neurons", "firing rates of neurons", plots.draw_neurons(shown)),
        f"<h2>Rasters</h2><p>Spikes of the first {DETAIL_TOKENS} tokens at most.</p>"
        + some
        + pictures.show("rasters", "spike rasters", plots.draw_rasters(shown)),
        "<h2>Membrane traces</h2><p>Before the reset, of the busiest neuron (red), a middling one (blue) and "
        "the quietest (grey); dashed: the threshold of the first.</p>"
        + some
        + pictures.show("traces", "membrane traces", plots.draw_traces(shown)),
        "<h2>Distributions of membranes</h2><p>Before the reset, all neurons and tokens; the count is"
        " logarithmic, red bars stand for all beyond the edge.</p>"
        + some
        + pictures.show("membranes", "distributions of membranes", plots.draw_membranes(shown)),
        "<h2>Intervals between spikes</h2>"
        + some
        + pictures.show("intervals", "intervals between spikes", plots.draw_intervals(shown)),
    ]
    write_page(page, f"Neurons of {text(str(facts.get('model', 'a model')))}", sections)
    write_json(numbers, as_json(analysis, facts, *limits))
    return [page, numbers, *pictures.written]


def as_json(
    analysis: Analysis, facts: Mapping[str, Any], dead_rate: float, saturated_rate: float
) -> dict[str, Any]:
    """The numbers behind the page."""
    return {
        "facts": dict(facts),
        "tokens": analysis.tokens,
        "dead_rate": dead_rate,
        "saturated_rate": saturated_rate,
        "layers": {layer.name: layer.as_dict(dead_rate, saturated_rate) for layer in analysis.layers},
        "subblocks": analysis.subblocks(),
    }


def _layers(analysis: Analysis, dead_rate: float, saturated_rate: float) -> str:
    heads = (
        "layer",
        "neurons",
        "rate",
        "dead",
        "saturated",
        "interval",
        "variation",
        "membrane",
        "outliers",
    )

    def row(layer: LayerStatistics) -> tuple[Any, ...]:
        unit = " (input)" if layer.threshold is None else ""
        return (
            layer.name.replace(".neurons.", " ").replace("blocks.", "block "),
            layer.channels,
            f"{layer.rates.mean():.4f}",
            int(layer.dead(dead_rate).sum()),
            int(layer.saturated(saturated_rate).sum()),
            _number(layer.mean_interval),
            _number(layer.interval_variation),
            f"{layer.lowest:.2f} to {layer.largest:.2f}{unit}",
            f"{100 * layer.outliers / (layer.tokens * layer.channels):.3f}%",
        )

    return table(heads, map(row, analysis.layers))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
