"""A classification task, all contenders, all seeds: resumable, and told in one table and one picture."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spikescale import files
from spikescale.ablation.statistics import t_interval
from spikescale.errors import UserError
from spikescale.finetune.contenders import Contender, Progress, Result
from spikescale.finetune.labelled import Labelled

RUNS, JSON_FILE, TABLE_FILE, PLOT_FILE = (
    "runs",
    "classification.json",
    "classification.md",
    "classification.png",
)


def task_fingerprint(task: Labelled) -> str:
    """SHA-256 of everything that the task consists of."""
    content = [
        task.classes,
        *(dataclasses.asdict(getattr(task, split)) for split in ("train", "valid", "test")),
    ]
    return files.sha256_text(json.dumps(content, sort_keys=True))


def run_key(fingerprint: str, contender: Contender, seed: int) -> dict[str, Any]:
    """All that decides a run's result, as JSON; `fingerprint` is the task's."""
    return {"task": fingerprint, "contender": contender.described, "name": contender.name, "seed": seed}


def compare(
    task: Labelled,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int], Progress] = lambda name, seed: lambda *values: None,
    finished: Callable[[Contender, int, Result], None] = lambda contender, seed, result: None,
    anew: Callable[[Contender, int], bool] = lambda contender, seed: False,
) -> dict[str, Any]:
    """Run what has not been run yet, one contender and seed after the other, and summarise.

    Every finished run is kept in `folder`/runs, and taken from there when the same is asked for again: the
    same task, settings and seed. `say` gets a line for each; `progress` makes what training calls;
    `finished` is called with each new result; a run of which `anew` is true is run in any case. Returns what
    `classification.json` holds; table and picture lie beside it.
    """
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    fingerprint = task_fingerprint(task)
    rows = []
    for contender in contenders:
        results = {}
        for seed in seeds if contender.seeded else seeds[:1]:
            key = run_key(fingerprint, contender, seed)
            file = folder / RUNS / f"{_slug(contender.name)}-seed{seed}.json"
            kept = files.read_json(file) if file.is_file() else None
            if kept is None or kept.get("key") != key or anew(contender, seed):
                result = contender.run(task, seed, progress(contender.name, seed))
                kept = {"key": key, **_plain(result)}
                files.write_json(file, kept)
                finished(contender, seed, result)
            say(f"{contender.name}, seed {seed}: {kept['test']['accuracy']:.2%}")
            results[seed] = kept
        rows.append(_row(contender, results))
    summary = {
        "task": task.name,
        "classes": task.classes,
        "examples": {split: len(getattr(task, split)) for split in ("train", "valid", "test")},
        "fingerprint": fingerprint,
        "notes": task.notes,
        "seeds": list(seeds),
        "rows": rows,
    }
    files.write_json(folder / JSON_FILE, summary)
    files.write_text(folder / TABLE_FILE, table(summary))
    plot(summary, folder / PLOT_FILE)
    return summary


def table(summary: dict[str, Any]) -> str:
    """Markdown: accuracy and macro-F1 in percent on the test split, mean and deviation over seeds."""
    counts = summary["examples"]
    lines = [
        f"{summary['task']}: {counts['train']:,} training, {counts['valid']:,} validation and "
        f"{counts['test']:,} test texts, {len(summary['classes'])} classes",
        "",
        "| | parameters | seeds | accuracy, % | macro-F1, % | best epoch |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        epochs = "" if row["best_epoch"] is None else f"{row['best_epoch']:.1f}"
        parameters = f"{row['parameters']:,}" if row["parameters"] else ""
        cells = [row["name"], parameters, str(len(row["accuracy"]["seeds"]))]
        cells += [_percent(row["accuracy"]), _percent(row["macro_f1"]), epochs]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw every seed's test accuracy, the means, and validation accuracy by epoch, to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = summary["rows"]
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(rows) + 2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for place, row in enumerate(reversed(rows)):
        values = [100 * value for value in row["accuracy"]["seeds"].values()]
        colour = f"C{(len(rows) - 1 - place) % 10}"
        deviation = row["accuracy"]["deviation"]
        error = None if deviation is None else 100 * deviation
        left.errorbar(100 * row["accuracy"]["mean"], place, xerr=error, fmt="D", color=colour, capsize=4)
        left.plot(values, [place + 0.18] * len(values), ".", color=colour, alpha=0.6)
        for index, curve in enumerate(row["valid_accuracy"].values()):
            if len(curve) > 1 and row["best_epoch"] is not None and row["by_epoch"]:
                label = row["name"] if index == 0 else None
                right.plot(
                    range(1, len(curve) + 1), [100 * v for v in curve], color=colour, alpha=0.7, label=label
                )
    left.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    left.set(xlabel="test accuracy, %: seeds, mean and deviation", title=summary["task"])
    right.set(xlabel="epoch", ylabel="validation accuracy, %", title="while training")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    with files.written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _row(contender: Contender, results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    some = next(iter(results.values()))
    epochs = [result["best_epoch"] for result in results.values() if result["best_epoch"]]
    return {
        "name": contender.name,
        "settings": contender.described,
        "chosen": some["chosen"],
        "parameters": some["parameters"],
        "accuracy": _over_seeds({seed: r["test"]["accuracy"] for seed, r in results.items()}),
        "macro_f1": _over_seeds({seed: r["test"]["macro_f1"] for seed, r in results.items()}),
        "best_epoch": math.fsum(epochs) / len(epochs) if epochs and some["train_loss"] else None,
        "by_epoch": bool(some["train_loss"]),
        "valid_accuracy": {
            str(seed): [scores["accuracy"] for scores in r["valid"]] for seed, r in results.items()
        },
    }


def _over_seeds(values: dict[int, float]) -> dict[str, Any]:
    interval = t_interval(list(values.values()))
    return {
        "mean": interval.mean,
        "deviation": None if len(values) == 1 else interval.deviation,
        "seeds": {str(seed): value for seed, value in values.items()},
    }


def _percent(figures: dict[str, Any]) -> str:
    mean = f"{100 * figures['mean']:.2f}"
    return mean if figures["deviation"] is None else f"{mean} ± {100 * figures['deviation']:.2f}"


def _plain(result: Result) -> dict[str, Any]:
    content = dataclasses.asdict(result.trained)
    if math.isnan(content["test"]["loss"]):
        content["test"]["loss"] = None
    return {**content, "parameters": result.parameters, "chosen": result.chosen}


def _slug(name: str) -> str:
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    if not slug.strip("-"):
        raise UserError(f"{name!r}: no name for a file can be made of it")
    return "-".join(part for part in slug.split("-") if part)
