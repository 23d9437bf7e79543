"""`spikescale scaling report`: a page about a ladder."""

import argparse
import re
from pathlib import Path
from typing import Any

from spikescale.cli.scaling_fit import (
    add_fit_arguments,
    add_point_arguments,
    fit_all,
    options_of,
    read_all,
)
from spikescale.errors import UserError

ENERGY_TOKENS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_point_arguments(parser)
    add_fit_arguments(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.html", help="the page; PNGs go beside it"
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="the ladder's plan: its points if none are given, and energy",
    )
    parser.add_argument("--title", default="A scaling law", help="of the page")
    parser.add_argument(
        "--twin", metavar="FAMILY", help="family without neurons that others are held against (default: rwkv)"
    )
    parser.add_argument("--budgets", default="1e18,1e20", metavar="FLOP", help="of the forecasts")
    parser.add_argument(
        "--vocab", type=int, default=256, metavar="V", help="symbols (default: the plan's, or 256)"
    )
    parser.add_argument("--no-energy", action="store_true", help="count no operations")
    parser.add_argument(
        "--log",
        metavar="URI",
        help="also log page, pictures and figures to this MLflow store (default: the plan's)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Fit, draw, write, log."""
    from spikescale.scaling.ladder import parse_numbers
    from spikescale.scaling.plan_file import read_plan
    from spikescale.scaling.report import Content, log_to_mlflow, write_report

    plan = read_plan(arguments.plan) if arguments.plan else None
    if plan is not None and not arguments.points and not arguments.mlflow:
        arguments.points = [plan.output / "points.csv"]
    families = read_all(arguments)
    if arguments.twin is not None and arguments.twin not in families:
        raise UserError(f"--twin {arguments.twin}: the points have {', '.join(families)}")
    twin = arguments.twin or ("rwkv" if "rwkv" in families and len(families) > 1 else None)
    options = options_of(arguments, ("chinchilla", "kaplan"), [1, 2, 3])
    results = fit_all(families, options)
    content = Content(
        title=arguments.title,
        results=results,
        twin=twin,
        vocab_size=plan.vocab_size if plan is not None else arguments.vocab,
        budgets=parse_numbers(arguments.budgets, "--budgets"),
        energy=_energy(plan, families, options.count) if plan is not None and not arguments.no_energy else {},
        origin=f"Plan {plan.name}, data {plan.base['data']['path']}." if plan is not None else "",
    )
    written = write_report(content, arguments.output)
    print(f"written: {arguments.output} and {len(written) - 1} pictures")
    if arguments.log is not None or plan is not None:
        print(f"logged to MLflow run {_log(arguments, plan, written, results, log_to_mlflow)}")
    return 0


def _energy(plan: Any, families: dict[str, Any], count: Any) -> dict[str, list[tuple[float, float, float]]]:
    from spikescale.scaling.energy_of_runs import energy_of_runs

    return energy_of_runs(plan, families, count, ENERGY_TOKENS)


def _log(arguments: argparse.Namespace, plan: Any, written: list[Path], results: list[Any], log: Any) -> str:
    from spikescale.scaling.scheduler import STATE, State
    from spikescale.scaling.tracking import store_of

    figures = {}
    for result in results:
        family = re.sub(r"[^\w .:-]", "_", result.family, flags=re.ASCII) or "points"  # what MLflow takes
        for name, form in result.forms.items():
            if not form.determined:
                continue
            for symbol, interval in form.parameters.items():
                figures[f"fit/{family}/{name}/{symbol}"] = interval.value
            figures[f"fit/{family}/{name}/N_opt_exponent"] = form.exponent.value
    uri = arguments.log or store_of(plan)
    known = State.read(plan.output / STATE).parent_run if plan is not None and arguments.log is None else None
    experiment = str(plan.base.get("mlflow", {}).get("experiment", plan.name)) if plan else "scaling"
    return str(log(written, figures, uri, experiment, known))
