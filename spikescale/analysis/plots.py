"""The pictures of an analysis, each as the bytes of a PNG."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from spikescale.analysis.collect import Analysis
from spikescale.analysis.statistics import LONGEST_INTERVAL, LayerStatistics

BLUE, RED, GREY = "#4878a8", "#c44e52", "#b8bcc4"
MOST_PANELS = 12  # layers shown one by one; of more, evenly spaced ones
TRACES = 3
SHOWN_INTERVALS = 40


def draw_rates(analysis: Analysis, dead_rate: float, saturated_rate: float) -> bytes:
    """Mean firing rate of each layer, and the shares of its neurons that are dead or saturated."""
    layers = analysis.layers
    figure, (left, right) = _figure(11, 0.8 + 0.22 * len(layers), 1, 2)
    places = np.arange(len(layers))
    left.barh(places, [layer.rates.mean() for layer in layers], color=BLUE)
    left.set(yticks=places, yticklabels=[layer.name for layer in layers], xlabel="spikes a token and neuron")
    dead = np.array([layer.dead(dead_rate).mean() for layer in layers])
    saturated = np.array([layer.saturated(saturated_rate).mean() for layer in layers])
    right.barh(places, dead, color=GREY, label="dead")
    right.barh(places, saturated, left=dead, color=RED, label="saturated")
    right.set(yticks=places, yticklabels=[], xlabel="share of the neurons", xlim=(0, 1))
    right.legend(fontsize=8)
    for panel in (left, right):
        panel.invert_yaxis()
        panel.tick_params(axis="y", labelsize=7)
    return _png(figure)


def draw_subblocks(analysis: Analysis) -> bytes | None:
    """SRWKV against SRFFN, block by block; None where neither has neurons."""
    rates = analysis.subblocks()
    if not rates["SRWKV"] and not rates["SRFFN"]:
        return None
    figure, (panel,) = _figure(7, 3, 1, 1)
    for shift, (kind, values) in zip((-0.2, 0.2), rates.items(), strict=True):
        places = [index for index, value in enumerate(values) if value is not None]
        panel.bar(
            np.array(places) + shift,
            [values[place] or 0.0 for place in places],
            0.4,
            label=kind,
            color=BLUE if kind == "SRWKV" else RED,
        )
    panel.set(xlabel="block", ylabel="spikes a token and neuron", xticks=range(len(rates["SRWKV"])))
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def draw_neurons(layers: Sequence[LayerStatistics]) -> bytes:
    """Firing rates of the neurons of each layer, in falling order."""
    figure, panels = _grid(layers)
    for panel, layer in zip(panels, layers, strict=False):
        panel.plot(np.sort(layer.rates)[::-1], color=BLUE)
        panel.set(xlabel="neuron, by rate", ylim=(0, 1.02))
        panel.set_title(layer.name, fontsize=8)
    return _png(figure)


def draw_rasters(layers: Sequence[LayerStatistics]) -> bytes:
    """Spikes of the first tokens."""
    figure, panels = _grid(layers, 1.9)
    for panel, layer in zip(panels, layers, strict=False):
        detail = layer.detail
        assert detail is not None
        limit = max(1.0, float(np.abs(detail.spikes).max()))
        panel.imshow(
            detail.spikes.T,
            aspect="auto",
            interpolation="nearest",
            cmap="coolwarm" if detail.spikes.min() < 0 else "Greys",
            vmin=-limit if detail.spikes.min() < 0 else 0,
            vmax=limit,
        )
        panel.set(xlabel="token", ylabel="neuron")
        panel.set_title(layer.name, fontsize=8)
    return _png(figure)


def draw_traces(layers: Sequence[LayerStatistics]) -> bytes:
    """Membranes of three neurons of each layer: the busiest, a middling one, the quietest."""
    figure, panels = _grid(layers, 1.9)
    for panel, layer in zip(panels, layers, strict=False):
        detail = layer.detail
        assert detail is not None
        assert detail.membranes is not None
        order = np.argsort(-layer.rates[detail.channels], kind="stable")
        for place, colour in zip((0, len(order) // 2, len(order) - 1), (RED, BLUE, GREY), strict=True):
            column = order[place]
            panel.plot(detail.membranes[:100, column], color=colour, linewidth=0.8)
            if layer.threshold is not None and place == 0:
                level = layer.threshold[detail.channels[column]]
                panel.axhline(level, color="black", linewidth=0.6, linestyle="--")
        panel.set(xlabel="token", ylabel="membrane")
        panel.set_title(layer.name, fontsize=8)
    return _png(figure)


def draw_membranes(layers: Sequence[LayerStatistics]) -> bytes:
    """Distributions of the membranes, with a logarithmic count so that outliers are seen."""
    figure, panels = _grid(layers, 1.7)
    for panel, layer in zip(panels, layers, strict=False):
        panel.stairs(layer.histogram[1:-1], layer.edges(), fill=True, color=BLUE)
        beyond = layer.histogram[[0, -1]]
        edge = layer.edges()[-1]
        panel.bar([-edge, edge], beyond, width=0.15, color=RED)
        panel.axvline(0.0 if layer.threshold is None else 1.0, color="black", linewidth=0.7, linestyle="--")
        panel.set_yscale("symlog")
        panel.set(xlabel="input" if layer.threshold is None else "membrane / threshold")
        panel.set_title(layer.name, fontsize=8)
    return _png(figure)


def draw_intervals(layers: Sequence[LayerStatistics]) -> bytes:
    """How many tokens lie between two spikes of a neuron."""
    figure, panels = _grid(layers)
    for panel, layer in zip(panels, layers, strict=False):
        shown = min(SHOWN_INTERVALS, LONGEST_INTERVAL)
        total = layer.intervals.sum()
        panel.bar(np.arange(1, shown + 1), layer.intervals[:shown] / max(total, 1), color=BLUE)
        panel.set(xlabel="tokens to the next spike")
        panel.set_title(layer.name, fontsize=8)
    return _png(figure)


def chosen(layers: Sequence[LayerStatistics]) -> list[LayerStatistics]:
    """The layers that are shown one by one: all of a few, of many some of them evenly spaced."""
    places = np.linspace(0, len(layers) - 1, min(len(layers), MOST_PANELS)).round().astype(int)
    return [layers[place] for place in places]


def _grid(layers: Sequence[LayerStatistics], height: float = 1.6) -> tuple[Any, Sequence[Any]]:
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, panels = _figure(11, 0.4 + height * rows, rows, columns)
    for panel in panels[len(layers) :]:
        panel.set_visible(False)
    for panel in panels:
        panel.tick_params(labelsize=6)
        panel.xaxis.label.set_size(7)
        panel.yaxis.label.set_size(7)
    return figure, panels


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
