"""Energy as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from spikescale.energy.constants import Prices
from spikescale.energy.operations import Part
from spikescale.energy.summary import by_layer, twin_total
from spikescale.files import written_aside

KINDS = ("projection", "head", "wkv", "gate", "mix", "activation", "norm", "neuron", "residual", "embedding")


def plot_energy(models: Mapping[str, Sequence[Part]], prices: Prices, path: Path) -> None:
    """A PNG: energy a token by layer of the first model, and of all models beside their float twins."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    name, parts = next(iter(models.items()))
    layers = by_layer(parts, prices)
    floor = [0.0] * len(layers)
    for kind in KINDS:
        values = [layers[layer].get(kind, 0.0) / 1e6 for layer in layers]
        if any(values):
            left.bar(list(layers), values, bottom=floor, label=kind)
            floor = [a + b for a, b in zip(floor, values, strict=True)]
    left.set(title=f"{name}: energy by layer", ylabel="microjoules a token")
    left.tick_params(axis="x", rotation=45)
    left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    places = range(len(models))
    twins = [twin_total(parts, prices) / 1e6 for parts in models.values()]
    right.bar([p - 0.2 for p in places], twins, 0.4, color="0.75", label="float twin")
    floor = [0.0] * len(models)
    for kind in KINDS:
        values = [
            sum(p.count.energy(prices) for p in parts if p.kind == kind) / 1e6 for parts in models.values()
        ]
        if any(values):
            right.bar([p + 0.2 for p in places], values, 0.4, bottom=floor, label=kind)
            floor = [a + b for a, b in zip(floor, values, strict=True)]
    for place, twin, here in zip(places, twins, floor, strict=True):
        right.annotate(f"{twin / here:.2f}x", (place + 0.2, here), ha="center", va="bottom", fontsize=8)
    right.set(title="whole model, head included, beside its float twin", ylabel="microjoules a token")
    right.set_xticks(list(places), list(models), rotation=30, ha="right")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"energies of {prices.name} ({prices.source}); arithmetic only, no memory")
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
