"""`spikescale ablate`: the variants of the model at equal budget, over seeds, in one table and one plot."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.ablation.runner import Watch
    from spikescale.ablation.study import AblationRun

EXAMPLES = """examples:
  spikescale ablate --config configs/run/ablation.yaml
  spikescale ablate --config configs/run/tiny.yaml --variants rwkv,spikegpt --seeds 5 name=pair

The same command again goes on where it was stopped; finished runs are not repeated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = EXAMPLES
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="run file of all runs")
    parser.add_argument(
        "--variants",
        default="rwkv,heaviside-rwkv,spikegpt-b,spikegpt,spikegpt-driven",
        metavar="NAMES",
        help="with commas between",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each variant: seeds 0 to N - 1"
    )
    parser.add_argument(
        "--split", default="test", choices=("valid", "test"), help="on which they are compared"
    )
    parser.add_argument(
        "--reference",
        default="rwkv",
        metavar="NAME",
        help="variant that the others are compared with, by seed",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="stop after so long, exit code 75; the run that is on is saved (default: when all is done)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time; set train.threads so that they do not fight for cores",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    parser.add_argument(
        "settings", nargs="*", metavar="key.sub=value", help="settings over those of the file, for all runs"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run what is not finished, then write and print what came of it."""
    from spikescale.ablation.mlflow_parent import record
    from spikescale.ablation.report import summarise, write_report
    from spikescale.ablation.runner import run_all
    from spikescale.ablation.study import plan_runs
    from spikescale.faults.exits import DONE, REQUEUE

    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: must be at least 1")
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: must be at least 1")
    if arguments.minutes is not None and arguments.minutes <= 0:
        raise UserError(f"--minutes {arguments.minutes}: must be above 0")
    variants = [name.strip() for name in arguments.variants.split(",") if name.strip()]
    runs = plan_runs(arguments.config, variants, range(arguments.seeds), arguments.settings)
    folder = runs[0].folder.parent
    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    with _progress(runs) as watch:
        complete = run_all(runs, arguments.config, seconds, watch, arguments.workers)
    if not complete and all(run.result() is None for run in runs):
        print(f"stopped before the first run was finished; the same command goes on: {folder}")
        return REQUEUE
    summary = summarise(runs, arguments.split, arguments.reference)
    summary["config"] = str(arguments.config)
    summary["settings"] = list(arguments.settings)
    write_report(runs, summary, folder)
    record(runs, summary, folder)
    _print(summary, folder, arguments.json)
    return DONE if complete else REQUEUE


@contextlib.contextmanager
def _progress(runs: "list[AblationRun]") -> "Iterator[Watch]":
    """A bar over the steps of all runs on a terminal; elsewhere a line for each run that starts."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    made: dict[Path, int] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("ablation", total=sum(run.config.train.steps for run in runs))

        def watch(run: "AblationRun", steps: int) -> None:
            if run.folder not in made and not console.is_terminal:
                state = "is finished" if steps == run.config.train.steps else "runs"
                print(f"{run.folder} {state} ({len(made) + 1} of {len(runs)})", file=sys.stderr, flush=True)
            made[run.folder] = steps
            bar.update(task, completed=sum(made.values()), description=run.folder.name)

        yield watch


def _print(summary: dict[str, Any], folder: Path, as_json: bool) -> None:
    import json

    from rich.console import Console
    from rich.table import Table

    from spikescale.ablation.report import JSON_FILE, PLOT_FILE, table_rows

    if as_json:
        print(json.dumps(summary, indent=2))
        return
    columns, rows = table_rows(summary)
    budget = summary["budget"]
    table = Table(title=f"{budget['tokens']:,} tokens a run ({budget['steps']} steps)", title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    if summary["finished"] < summary["planned"]:
        print(f"{summary['finished']} of {summary['planned']} runs are finished; the same command goes on")
    print(f"{folder / JSON_FILE}\n{folder / PLOT_FILE}")
