"""A plan and its state as tables for people."""

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from spikescale.planning.devices import find_device
from spikescale.scaling.plan_file import Plan

COLUMNS = 170


def console() -> Console:
    """As wide as the terminal, or as a file can bear."""
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else COLUMNS)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table whose first `left` columns are aligned left and the others right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=index < left)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def compact(number: float) -> str:
    """1.62M, 54.7k, 3.2G."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """2.3 h, 12 min, 40 s."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} d"
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def show_plan(plan: Plan) -> None:
    """Print every run with its cost, and the sums."""
    rows = []
    for run in plan.runs:
        epochs = run.tokens / plan.train_tokens
        rows.append(
            [
                run.name,
                compact(run.parameters),
                compact(run.parameters_non_embedding),
                compact(run.tokens),
                f"{epochs:.2f}",
                f"{run.tokens / run.parameters:.3g}",
                str(run.steps),
                f"{run.lr:.2e}",
                f"{run.flop:.2e}",
                f"{run.cost_flop:.2e}",
                duration(run.seconds),
            ]
        )
    columns = ["run", "N", "N body", "D", "epochs", "D/N", "steps", "lr", "FLOP", "costs", "est."]
    show_table(f"{plan.name}: {plan.design}, {len(plan.runs)} runs", columns, rows)
    cost = sum(run.cost_flop for run in plan.runs)
    apart = sum(run.flop for run in plan.runs if run.kind != "trunk")
    seconds = sum(run.seconds for run in plan.runs)
    print(
        f"in all {cost:.3g} FLOP, an estimated {duration(seconds)} of one device"
        f" ({find_device(plan.device).name})"
    )
    if any(run.kind == "branch" for run in plan.runs):
        print(f"without branches the same points would cost {apart:.3g} FLOP")
    print(
        "estimated by a roofline: models below a few million parameters take longer, by their step's overhead"
    )
    most = max(run.tokens for run in plan.runs) / plan.train_tokens
    if most > 1:
        print(
            f"warning: up to {most:.1f} passes over the data's {plan.train_tokens} tokens: a law of"
            f" repeated data"
            " is another one; take a larger corpus or fewer tokens",
            file=sys.stderr,
        )


def show_status(plan: Plan, status: Mapping[str, str], failures: Mapping[str, Sequence[str]]) -> None:
    """Print how many runs are in which state, and why any failed."""
    counts = {kind: sum(found == kind for found in status.values()) for kind in sorted(set(status.values()))}
    print(f"{plan.name}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    for name, found in status.items():
        if found == "failed":
            print(
                f"failed: {name}: {failures[name][-1]} ({plan.output / name / 'console.txt'})",
                file=sys.stderr,
            )
