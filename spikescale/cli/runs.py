"""`spikescale runs`: list and compare the runs that MLflow keeps."""

import argparse
import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spikescale.errors import UserError

DESCRIPTION = """Runs in MLflow: a table of them, or some of them side by side.

  spikescale runs list --sort loss/valid
  spikescale runs list --filter "params.model.variant = 'spikegpt' and metrics.\\`loss/valid\\` < 2"
  spikescale runs compare tiny other 3f2a91c0 --output compare.png"""
METRICS = (
    ("loss/train", "train loss", ".4f"),
    ("loss/valid", "valid loss", ".4f"),
    ("loss/valid_bits_per_byte", "bits/byte", ".4f"),
    ("neurons/mean_firing_rate", "firing", ".3f"),
    ("optimizer/tokens", "tokens", ".4g"),
    ("speed/tokens_per_second", "tok/s", ".4g"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands."""
    parser.description = DESCRIPTION
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    listing = actions.add_parser("list", help="a table of runs", formatter_class=parser.formatter_class)
    _add_store(listing)
    listing.add_argument("--experiment", metavar="NAME", help="only of this one (default: all)")
    listing.add_argument("--filter", default="", metavar="EXPRESSION", help="MLflow's, see above")
    listing.add_argument(
        "--sort", default="start", metavar="KEY", help="start, name, or a metric, lowest first"
    )
    listing.add_argument("--limit", type=int, default=50, metavar="N", help="newest runs that are looked at")
    listing.add_argument("--models", action="store_true", help="the registry's models instead")
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    comparing = actions.add_parser(
        "compare", help="runs side by side", formatter_class=parser.formatter_class
    )
    _add_store(comparing)
    comparing.add_argument("runs", nargs="+", metavar="RUN", help="id, its beginning (4 or more), or name")
    comparing.add_argument("--output", type=Path, metavar="FILE.png", help="also draw their curves")
    comparing.add_argument(
        "--against", choices=("tokens", "steps"), default="tokens", help="what curves run over"
    )
    comparing.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--uri", metavar="URI", help="MLflow store (default: $MLFLOW_TRACKING_URI, or runs/mlflow.db)"
    )


def run(arguments: argparse.Namespace) -> int:
    """List or compare."""
    from spikescale.tracking.registry import store_address
    from spikescale.tracking.run_table import RunStore

    uri = arguments.uri or store_address()
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.is_file():
        raise UserError(f"--uri {uri}: no such file")
    store = RunStore(uri)
    return _list(store, arguments) if arguments.action == "list" else _compare(store, arguments)


def _list(store: Any, arguments: argparse.Namespace) -> int:
    from spikescale.scaling.tables import duration, show_table

    if arguments.models:
        return _models(arguments)
    runs = store.runs(arguments.experiment, arguments.filter, arguments.limit)
    runs.sort(key=lambda run: _order(run, arguments.sort))
    if arguments.json:
        print(json.dumps([asdict(run) for run in runs], indent=2))
        return 0
    rows = [
        [
            run.id[:8],
            run.name,
            run.experiment,
            run.status.lower(),
            datetime.datetime.fromtimestamp(run.started).strftime("%Y-%m-%d %H:%M"),
            "-" if run.seconds is None else duration(run.seconds),
            *_metrics(run),
        ]
        for run in runs
    ]
    heads = ["id", "name", "experiment", "status", "started", "took", *(label for _, label, _ in METRICS)]
    show_table(f"{len(rows)} runs", heads, rows, left=2)
    return 0


def _order(run: Any, key: str) -> Any:
    if key == "start":
        return -run.started
    return run.name if key == "name" else run.metrics.get(key, float("inf"))


def _metrics(run: Any) -> list[str]:
    return [format(run.metrics[key], shape) if key in run.metrics else "-" for key, _, shape in METRICS]


def _models(arguments: argparse.Namespace) -> int:
    from spikescale.scaling.tables import show_table
    from spikescale.tracking.mlflow_store import open_client
    from spikescale.tracking.registry import store_address

    client = open_client(arguments.uri or store_address())
    versions = sorted(client.search_model_versions(), key=lambda v: (v.name, int(v.version)))
    if arguments.json:
        print(
            json.dumps([{"name": v.name, "version": v.version, "run": v.run_id, **v.tags} for v in versions])
        )
        return 0
    keys = ("variant", "layers", "width", "step", "valid_loss", "valid_bits_per_byte")
    rows = [
        [f"models:/{v.name}/{v.version}", v.run_id[:8], *(v.tags.get(k, "-") for k in keys)] for v in versions
    ]
    show_table(f"{len(rows)} models", ["model", "run", *keys], rows, left=3)
    return 0


def _compare(store: Any, arguments: argparse.Namespace) -> int:
    from spikescale.tracking.comparison import plot_comparison
    from spikescale.tracking.run_table import differing

    runs = [store.named(word) for word in arguments.runs]
    if arguments.json:
        print(json.dumps([asdict(run) for run in runs], indent=2))
    else:
        _show(store, runs, differing(runs))
    if arguments.output is not None:
        plot_comparison(store, runs, arguments.output, arguments.against)
        if not arguments.json:
            print(f"written: {arguments.output}")
    return 0


def _show(store: Any, runs: Sequence[Any], keys: Sequence[str]) -> None:
    from spikescale.scaling.tables import show_table
    from spikescale.tracking.run_table import LOSS, sparkline

    heads = ["", *(f"{run.name} ({run.id[:8]})" for run in runs)]
    show_table(
        "settings that differ", heads, [[key, *(run.settings.get(key, "-") for run in runs)] for key in keys]
    )
    rows = [
        [label, *values]
        for (_, label, _), values in zip(METRICS, zip(*map(_metrics, runs), strict=True), strict=True)
    ]
    show_table("last figures", heads, rows)
    for run in runs:
        curve = [value for _, value in store.history(run, LOSS)]
        if curve:
            print(f"{run.name:>24}  loss {curve[0]:.3f} {sparkline(curve)} {curve[-1]:.3f}")
