"""The pictures of a report, each as the bytes of a PNG."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spikescale.data_pipeline.clean.record import BINS_PER_OCTAVE
from spikescale.data_pipeline.clean.summary import CleaningTotals

BLUE, RED, GREY = "#4878a8", "#c44e52", "#b8bcc4"
MOST_BARS = 20


def draw_flow(totals: CleaningTotals) -> bytes:
    """Documents, and characters, that are left after each stage."""
    names = ["read", *(stage.name for stage in totals.stages)]
    documents = [totals.stages[0].documents_in, *(stage.documents_out for stage in totals.stages)]
    characters = [totals.stages[0].characters_in, *(stage.characters_out for stage in totals.stages)]
    return _two_panels(names, documents, characters, BLUE, "left")


def draw_drops(totals: CleaningTotals) -> bytes | None:
    """Documents, and characters, that each rule dropped; None when nothing was dropped."""
    rules = [(rule, counts) for stage in totals.stages for rule, counts in stage.dropped.items()]
    rules.sort(key=lambda item: -item[1][0])
    if not rules:
        return None
    shown = rules[:MOST_BARS]
    names = [rule for rule, _ in shown]
    return _two_panels(names, [c[0] for _, c in shown], [c[1] for _, c in shown], RED, "dropped")


def draw_lengths(lengths: Mapping[str, Mapping[int, int]]) -> bytes | None:
    """Document lengths in characters before and after cleaning; None without documents."""
    places = sorted({*lengths["before"], *lengths["after"]})
    if not places:
        return None
    bins = np.arange(places[0], places[-1] + 1)
    edges = 2.0 ** (np.append(bins, bins[-1] + 1) / BINS_PER_OCTAVE)
    figure, (panel,) = _figure(8, 3.2, 1)
    for name, colour, filled in (("before", GREY, True), ("after", BLUE, False)):
        counts = [lengths[name].get(int(place), 0) for place in bins]
        label = f"{name}: {sum(counts):,} documents"
        panel.stairs(counts, edges, color=colour, fill=filled, label=label, linewidth=1.6)
    panel.set_xscale("log")
    panel.set_xlabel("characters in a document")
    panel.set_ylabel("documents")
    panel.legend(frameon=False, fontsize=9)
    return _png(figure)


def draw_languages(languages: Mapping[str, int]) -> bytes | None:
    """Documents that were judged to be in each language; None when that was not asked."""
    if not languages:
        return None
    shown = sorted(languages.items(), key=lambda item: (-item[1], item[0]))[:MOST_BARS]
    figure, (panel,) = _figure(8, 0.26 * len(shown) + 1.0, 1)
    _bars(panel, [name for name, _ in shown], [count for _, count in shown], BLUE)
    panel.set_xlabel("documents")
    return _png(figure)


def draw_clusters(clusters: Mapping[str, Any]) -> bytes | None:
    """How many groups of duplicates have each size; None when there are none."""
    sizes = sorted((int(size), count) for size, count in clusters["sizes"].items())
    if not sizes:
        return None
    figure, (panel,) = _figure(8, 2.8, 1)
    panel.plot([size for size, _ in sizes], [count for _, count in sizes], "o", color=BLUE, markersize=5)
    panel.vlines([size for size, _ in sizes], 0, [count for _, count in sizes], color=BLUE, linewidth=1)
    panel.set_xscale("log")
    panel.set_ylim(bottom=0)
    panel.yaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("documents in a group, the one that is kept included")
    panel.set_ylabel("groups")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.xaxis.set_minor_formatter(lambda value, _: "")
    panel.set_xticks(sorted({size for size, _ in sizes})[:12])
    return _png(figure)


def _two_panels(
    names: Sequence[str], documents: Sequence[int], characters: Sequence[int], colour: str, title: str
) -> bytes:
    figure, panels = _figure(10, 0.28 * len(names) + 1.2, 2)
    for panel, values, unit in zip(panels, (documents, characters), ("documents", "characters"), strict=True):
        _bars(panel, names, values, colour)
        panel.set_title(f"{unit} {title}", fontsize=10)
    panels[1].set_yticklabels([])
    return _png(figure)


def _bars(panel: Any, names: Sequence[str], values: Sequence[int], colour: str) -> None:
    places = np.arange(len(names))[::-1]
    panel.barh(places, values, color=colour, height=0.7)
    panel.set_yticks(places, names, fontsize=9)
    panel.set_xlim(0, max(1, *values) * 1.22)
    panel.set_ylim(-0.6, len(names) - 0.4)
    panel.xaxis.set_major_formatter(lambda value, _: _short(value))
    for place, value in zip(places, values, strict=True):
        panel.annotate(
            f"{value:,}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8
        )


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    return figure, panels


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
