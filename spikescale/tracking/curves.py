"""A run's curves as one picture: loss, learning rate, speed, firing rate of each layer."""

import math
from pathlib import Path
from typing import Any

from spikescale.files import written_aside


def plot_curves(records: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw the records of a metrics file to a PNG; whether there was anything to draw."""
    trained = [r for r in records if r.get("loss") is not None]
    if not trained:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    steps = [r["step"] for r in trained]

    loss = axes[0][0]
    loss.plot(steps, [r["loss"] for r in trained], linewidth=1, label="train")
    valid = [r for r in records if r.get("valid_loss") is not None]
    if valid:
        loss.plot(
            [r["step"] for r in valid], [r["valid_loss"] for r in valid], "o-", markersize=3, label="valid"
        )
    loss.set(title="loss", xlabel="step", ylabel="nats a token")
    loss.legend()

    rates = axes[0][1]
    layers = trained[-1].get("firing_rates") or {}
    for name in layers:
        values = [_number((r.get("firing_rates") or {}).get(name)) for r in trained]
        rates.plot(steps, values, linewidth=1, label=name)
    rates.set(title="firing rate", xlabel="step", ylabel="spikes a token and neuron", ylim=(0, None))
    if layers:
        rates.legend(fontsize=6, ncols=2)

    norm = axes[1][0]
    known = [r for r in trained if r.get("gradient_norm") is not None]
    norm.semilogy(
        [r["step"] for r in known], [r["gradient_norm"] for r in known], linewidth=1, label="gradient norm"
    )
    norm.semilogy(steps, [_number(r.get("lr")) for r in trained], linewidth=1, label="learning rate")
    norm.set(title="gradient norm and learning rate", xlabel="step")
    norm.legend()

    speed = axes[1][1]
    speed.plot(steps, [_number(r.get("tokens_per_second")) / 1000 for r in trained], linewidth=1)
    speed.set(title="speed", xlabel="step", ylabel="thousand tokens a second", ylim=(0, None))

    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def _number(value: float | None) -> float:
    # A gap in the curve where the file has null.
    return math.nan if value is None else value
