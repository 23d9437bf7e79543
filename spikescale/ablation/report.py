"""What an ablation found: JSON, a table and a plot."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikescale.ablation.statistics import Interval, paired_difference, t_interval
from spikescale.ablation.study import AblationRun
from spikescale.errors import UserError
from spikescale.files import write_json, written_aside
from spikescale.tracking.metrics_file import read_metrics

JSON_FILE, PLOT_FILE = "ablation.json", "ablation.png"
CONFIDENCE = 0.95
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: told apart by everybody


def summarise(runs: Sequence[AblationRun], split: str, reference: str) -> dict[str, Any]:
    """The figures of all finished runs as plain JSON; variants in the order of their means, best first.

    `split` is that of the bits per byte; `reference` the variant that the others are compared with, seed by
    seed. Raises UserError when no run is finished, or when one lacks the split.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        result = run.result()
        if result is None:
            continue
        if split not in result["splits"]:
            raise UserError(f"{run.folder}: has no {split} split; there are {', '.join(result['splits'])}")
        found.setdefault(run.variant, {})[run.seed] = result
    if not found:
        raise UserError(f"{runs[0].folder.parent}: no run is finished")
    values = {
        variant: {seed: result["splits"][split]["bits_per_byte"] for seed, result in results.items()}
        for variant, results in found.items()
    }
    config = runs[0].config
    tokens = config.train.steps * config.train.batch_size * config.model.context_length
    rows = []
    for variant, by_seed in values.items():
        results = list(found[variant].values())
        rates = [rate for result in results if (rate := result["firing_rate"]) is not None]
        difference = None
        if variant != reference and reference in values:
            difference = paired_difference(by_seed, values[reference], CONFIDENCE)
        rows.append(
            {
                "variant": variant,
                "parameters": results[0]["parameters"],
                "seeds": {str(seed): value for seed, value in sorted(by_seed.items())},
                "bits_per_byte": _plain(t_interval(list(by_seed.values()), CONFIDENCE)),
                "difference": None if difference is None else _plain(difference),
                "firing_rate": math.fsum(rates) / len(rates) if rates else None,
            }
        )
    rows.sort(key=lambda row: row["bits_per_byte"]["mean"])
    return {
        "split": split,
        "reference": reference,
        "confidence": CONFIDENCE,
        "budget": {
            "steps": config.train.steps,
            "tokens": tokens,
            "scored_tokens": max(
                result["splits"][split]["tokens"] for results in found.values() for result in results.values()
            ),
        },
        "finished": sum(map(len, values.values())),
        "planned": len(runs),
        "variants": rows,
    }


def _plain(interval: Interval) -> dict[str, float | None]:
    # JSON has no NaN: with one seed there is no interval.
    numbers = dataclasses.asdict(interval)
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def table_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table."""
    split, reference = summary["split"], summary["reference"]
    percent = f"{summary['confidence']:.0%}"
    columns = [
        "variant",
        "parameters",
        "seeds",
        f"{split} bits/byte",
        f"{percent} interval",
        f"minus {reference}, by seed",
        "spikes a token and neuron",
    ]
    rows = []
    for row in summary["variants"]:
        value, difference = row["bits_per_byte"], row["difference"]
        rate = row["firing_rate"]
        rows.append(
            [
                row["variant"],
                f"{row['parameters']:,}",
                str(len(row["seeds"])),
                f"{value['mean']:.4f}",
                "-" if value["low"] is None else f"{value['low']:.4f} .. {value['high']:.4f}",
                "-" if difference is None else _signed(difference),
                "-" if rate is None else f"{rate:.3f}",
            ]
        )
    return columns, rows


def _signed(difference: dict[str, float | None]) -> str:
    mean, low, high = (difference[name] for name in ("mean", "low", "high"))
    assert mean is not None
    if low is None or high is None:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} ({low:+.4f} .. {high:+.4f})"


def write_report(runs: Sequence[AblationRun], summary: dict[str, Any], folder: Path) -> None:
    """Write ablation.json and ablation.png into `folder`."""
    write_json(folder / JSON_FILE, summary)
    draw(runs, summary, folder / PLOT_FILE)


def draw(runs: Sequence[AblationRun], summary: dict[str, Any], path: Path) -> None:
    """Left: validation curves, mean and range over seeds; right: the figures with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    order = [row["variant"] for row in summary["variants"]]
    colours = {variant: COLOURS[place % len(COLOURS)] for place, variant in enumerate(sorted(order))}
    for variant in order:
        curves = [curve for run in runs if run.variant == variant and (curve := _valid_curve(run))]
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        if steps:
            bands = [[curve[step] for curve in curves] for step in steps]
            means = [math.fsum(band) / len(band) for band in bands]
            left.plot(steps, means, "o-", markersize=3, color=colours[variant], label=variant)
            left.fill_between(
                steps, [min(band) for band in bands], [max(band) for band in bands],
                color=colours[variant], alpha=0.2, linewidth=0,
            )  # fmt: skip
    left.set(title="validation, mean and range over seeds", xlabel="step", ylabel="bits per byte")
    if order:
        left.legend()
    for place, row in enumerate(summary["variants"]):
        colour, value = colours[row["variant"]], row["bits_per_byte"]
        if value["low"] is not None:
            half = (value["high"] - value["low"]) / 2
            right.errorbar([value["mean"]], [place], xerr=[half], fmt="none", color=colour, capsize=5)
        right.plot([value["mean"]], [place], "D", color=colour, markersize=6)
        right.plot(list(row["seeds"].values()), [place] * len(row["seeds"]), "o", color=colour, alpha=0.4)
    right.set_yticks(range(len(order)), order)
    right.set_ylim(len(order) - 0.5, -0.5)
    confidence = f"{summary['confidence']:.0%}"
    right.set(title=f"{summary['split']}: mean, seeds, {confidence} t interval", xlabel="bits per byte")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    budget = summary["budget"]
    figure.suptitle(f"{summary['finished']} runs of {budget['tokens']:,} tokens each")
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _valid_curve(run: AblationRun) -> dict[int, float]:
    if run.result() is None:
        return {}
    records = read_metrics(run.folder / "metrics.jsonl")
    return {
        record["step"]: record["valid_bits_per_byte"]
        for record in records
        if record.get("valid_bits_per_byte") is not None
    }
