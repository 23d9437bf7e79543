"""Curves of several runs in one picture."""

from collections.abc import Sequence
from pathlib import Path

from spikescale.errors import UserError
from spikescale.files import written_aside
from spikescale.tracking.run_table import FIRING, LOSS, SPEED, VALID, Run, RunStore

PANELS = (
    (LOSS, "training loss", "nats a token"),
    (VALID, "validation loss", "nats a token"),
    (FIRING, "firing rate", "spikes a token and neuron"),
    (SPEED, "speed", "tokens a second"),
)


def plot_comparison(store: RunStore, runs: Sequence[Run], path: Path, against: str = "tokens") -> None:
    """Draw loss, validation loss, firing rate and speed of all runs against tokens or steps, to a PNG.

    Raises UserError for a run of which the tokens of a step are not known, unless drawn against steps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (metric, title, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for index, run in enumerate(runs):
            points = store.history(run, metric)
            if not points:
                continue
            scale = tokens_of_step(run) if against == "tokens" else 1.0
            marker = "o-" if metric == VALID else "-"
            label = f"{run.name} ({run.id[:8]})"
            axis.plot(
                [step * scale for step, _ in points],
                [value for _, value in points],
                marker,
                color=f"C{index % 10}",
                markersize=3,
                linewidth=1,
                label=label,
            )
        axis.set(title=title, xlabel=against, ylabel=unit)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def tokens_of_step(run: Run) -> float:
    """Tokens of an optimizer step, by the run's settings. Raises UserError where they do not say."""
    try:
        return float(run.settings["train.batch_size"]) * float(run.settings["model.context_length"])
    except (KeyError, ValueError):
        raise UserError(
            f"{run.name} ({run.id[:8]}): its settings do not say how many tokens a step has"
            " (train.batch_size, model.context_length): draw --against steps, or leave this run out"
        ) from None
