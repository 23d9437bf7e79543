#!/usr/bin/env python3
"""The best learning rate by width, under muP and without it, for small models of a synthetic language.

    python benchmarks/width_transfer.py

Trains every width at every rate from several seeds, each with a language, sequences and first weights of its
own, and takes the mean loss of the last five steps. Writes benchmarks/results/width_transfer.json and .png.
Takes some minutes.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, command_line, positive, show, write_results
from rich.progress import track
from torch import Tensor

from spikescale.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from spikescale.files import written_aside
from spikescale.model import SpikeGPT, language_model_loss
from spikescale.training.engine import build_optimizer

SYMBOLS, LENGTH = 32, 32
TUNED = 32  # the width that the rates are named for
WARMUP_STEPS = 5
LAST = 5  # steps whose mean loss counts


@dataclass(frozen=True)
class Setting:
    """What is trained: every width at every rate, with muP and, if `ordinary`, without."""

    steps: int = 200
    layers: int = 2
    batch: int = 16
    widths: tuple[int, ...] = (32, 64, 128)
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    ordinary: bool = True

    @property
    def rows(self) -> list[tuple[int, int | None]]:
        """(width, width_transfer) of every row; at the tuned width both are the same."""
        ordinary = [(width, None) for width in self.widths if width != TUNED and self.ordinary]
        return [*((width, TUNED) for width in self.widths), *ordinary]


SETTINGS = {
    "two layers": Setting(),
    "40 steps": Setting(
        steps=40, widths=(32, 64, 128, 256), rates=(8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1), ordinary=False
    ),
}


def config(width: int, transfer: int | None, lr: float = 1e-2, layers: int = 2) -> RunConfig:
    """The settings of one model and its optimizer."""
    model = ModelConfig(
        layers=layers,
        width=width,
        vocab_size=SYMBOLS,
        context_length=LENGTH,
        binary_embedding=False,
        width_transfer=transfer,
    )
    train = TrainConfig(lr=lr, min_lr=0.0, optimizer="adamw", weight_decay=0.1)
    return RunConfig(data=DataConfig(path="unused"), model=model, train=train)


@functools.lru_cache(maxsize=8)
def batches(count: int, batch: int, seed: int) -> list[Tensor]:
    """(batch, LENGTH + 1) tokens in which each symbol is one of three that the two before it allow."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.randint(SYMBOLS, (SYMBOLS, SYMBOLS, 3), generator=generator)
    found = []
    for _ in range(count):
        tokens = torch.randint(SYMBOLS, (batch, LENGTH + 1), generator=generator)
        for t in range(2, LENGTH + 1):
            pick = torch.randint(3, (batch,), generator=generator)
            tokens[:, t] = allowed[tokens[:, t - 1], tokens[:, t - 2], pick]
        found.append(tokens)
    return found


def train(
    width: int, transfer: int | None, lr: float, steps: int, layers: int = 2, batch: int = 16, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Losses (nats a token) and root mean squares of the logits, by step, at a constant rate."""
    settings = config(width, transfer, lr, layers)
    model = SpikeGPT(settings.model, seed)
    optimizer = build_optimizer(model, settings)
    losses, sizes = [], []
    for step, tokens in enumerate(batches(steps, batch, seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0) * min(1, (step + 1) / WARMUP_STEPS)
        logits, _ = model(tokens[:, :-1])
        loss, _ = language_model_loss(logits, tokens[:, 1:], 0.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        sizes.append(float(logits.detach().square().mean().sqrt()))
    return losses, sizes


def measured(name: str, setting: Setting, seeds: Sequence[int]) -> dict[str, Any]:
    """The last losses of a setting's runs, by row and rate, one a seed."""
    runs = [(row, rate, seed) for seed in seeds for row in setting.rows for rate in setting.rates]
    found: dict[tuple[int, int | None], dict[str, list[float]]] = {}
    for row, rate, seed in track(runs, description=name):
        losses, _ = train(*row, rate, setting.steps, setting.layers, setting.batch, seed)
        found.setdefault(row, {}).setdefault(f"{rate:g}", []).append(statistics.fmean(losses[-LAST:]))
    rows = [{"width": w, "width_transfer": t, "losses": found[w, t]} for w, t in setting.rows]
    return {**asdict(setting), "rows": rows}


def means(row: dict[str, Any]) -> dict[str, float]:
    """Mean loss over the seeds, by rate."""
    return {rate: statistics.fmean(losses) for rate, losses in row["losses"].items()}


def label(row: dict[str, Any]) -> str:
    """`64, muP` or `64, ordinary`."""
    if row["width"] == TUNED:
        return str(TUNED)
    return f"{row['width']}, {'muP' if row['width_transfer'] else 'ordinary'}"


def tabulate(name: str, found: dict[str, Any]) -> None:
    """Print the means, the best of each row with a star."""
    rates = [f"{rate:g}" for rate in found["rates"]]
    rows = []
    for row in found["rows"]:
        mean = means(row)
        least = min(mean.values())
        rows.append([label(row), *(f"{mean[r]:.3f}{' *' if mean[r] == least else ''}" for r in rates)])
    show(f"{name}: mean of the last {LAST} losses, {found['steps']} steps", ["width", *rates], rows)


def draw(found: dict[str, Any], path: Path) -> None:
    """Loss against rate, a line a width: muP, and ordinary beside it. Dots: single seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(found["widths"], ("#4878a8", "#e1812c", "#3a923a", "#c44e52"), strict=False))
    for panel, title, own in zip(panels, ("muP", "ordinary"), (TUNED, None), strict=True):
        for row in found["rows"]:
            if row["width"] != TUNED and row["width_transfer"] != own:
                continue
            rates, mean = found["rates"], list(means(row).values())
            colour = colours[row["width"]]
            panel.plot(rates, mean, color=colour, label=f"width {row['width']}")
            for rate, losses in zip(rates, row["losses"].values(), strict=True):
                panel.plot([rate] * len(losses), losses, ".", color=colour, markersize=4, alpha=0.6)
            best = min(range(len(mean)), key=mean.__getitem__)
            panel.plot(rates[best], mean[best], "o", color=colour, markersize=9, markerfacecolor="none")
        panel.set(xscale="log", xlabel="learning rate", title=f"{title} (ring: best rate)")
        panel.set_xticks(found["rates"], [f"{rate:g}" for rate in found["rates"]])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss, nats a token")
    panels[0].legend()
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the tables, write the JSON and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "benchmarks" / "results" / "width_transfer.json"
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--quick", action="store_true", help="two small widths, two rates and six steps")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    found = {}
    for name in arguments.settings:
        setting = SETTINGS[name]
        if arguments.quick:
            setting = replace(setting, steps=6, widths=(32, 64), rates=setting.rates[1:3])
        found[name] = measured(name, setting, arguments.seeds)
        tabulate(name, found[name])
    command = command_line("width_transfer.py", sys.argv[1:] if argv is None else argv)
    write_results(
        {"command": command, "tuned_width": TUNED, "seeds": arguments.seeds, "settings": found},
        arguments.output,
    )
    draw(next(iter(found.values())), arguments.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
