"""`spikescale scaling run`: the runs of a plan, on Ray or as a SLURM job array."""

import argparse
import fnmatch
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikescale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("plan", type=Path, help="a plan of `spikescale scaling plan`")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="runs, by name or pattern such as '*-4x32-*'"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="ranks that train at the same time"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of a rank")
    parser.add_argument("--gpus", action="store_true", help="each rank takes a GPU")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="a running Ray cluster (default: a local one)"
    )
    parser.add_argument(
        "--retries", type=int, default=1, metavar="N", help="of a failed run, then it is marked"
    )
    parser.add_argument("--retry-failed", action="store_true", help="forget earlier failures")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="then save and end; the same command goes on (default: no end)",
    )
    parser.add_argument("--no-mlflow", action="store_true", help="do not track in MLflow")
    parser.add_argument("--set", nargs="*", default=[], metavar="key.sub=value", help="settings of every run")
    parser.add_argument("--slurm", type=Path, metavar="FOLDER", help="write a job array there instead")
    parser.add_argument("--collect", action="store_true", help="run nothing; only write the points there are")


def run(arguments: argparse.Namespace) -> int:
    """Run what is open; 1 when a run failed, 75 when some are left open."""
    from spikescale.config.load import settings_of
    from spikescale.faults.exits import REQUEUE
    from spikescale.scaling import outcomes
    from spikescale.scaling.plan_file import read_plan
    from spikescale.scaling.points import write_points
    from spikescale.scaling.scheduler import STATE, State, status_of
    from spikescale.scaling.slurm import CONFIG, write_arrays, write_config
    from spikescale.scaling.tables import show_status
    from spikescale.scaling.tracking import end_parent_run

    plan = read_plan(arguments.plan)
    for planned in plan.runs:
        settings_of(plan.base, [*plan.settings(planned), *arguments.set], f"{arguments.plan}: {planned.name}")
    chosen = [planned.name for planned in plan.runs if _is_chosen(planned.name, arguments.only)]
    if not chosen:
        raise UserError(f"--only {' '.join(arguments.only)}: matches no run of {arguments.plan}")
    state = State.read(plan.output / STATE)
    if arguments.retry_failed:
        state.failures.clear()
    extra = [*arguments.set, *(["mlflow.enabled=false"] if arguments.no_mlflow else [])]
    if arguments.slurm is not None:
        status = status_of(plan, state, arguments.retries)
        runs = [r for r in plan.runs if r.name in chosen and status[r.name] in ("open", "started")]
        script = write_arrays(plan, runs, arguments.slurm, arguments.workers, arguments.gpus, extra)
        print(f"written: {script}, for {len(runs)} runs; start it with: bash {script} [words for sbatch]")
        return 0
    if arguments.collect:
        status = status_of(plan, state, arguments.retries)
    else:
        config = write_config(plan, plan.output / CONFIG)
        if not arguments.no_mlflow:
            _parent_run(plan, state, arguments.plan)
        status = _run(plan, config, state, chosen, arguments, extra)
        if state.parent_run is not None and not arguments.no_mlflow:
            end_parent_run(plan, state.parent_run, all(found == "finished" for found in status.values()))
    points = outcomes.points_of_plan(plan)
    if points:
        write_points(points, plan.output / "points.csv")
        finals = sum(point.final for point in points)
        print(
            f"written: {plan.output / 'points.csv'}, {finals} runs' losses and {len(points) - finals} of"
            f" curves"
        )
    show_status(plan, status, state.failures)
    if any(status[name] in ("failed", "blocked") for name in chosen):
        return 1
    return 0 if all(status[name] == "finished" for name in chosen) else REQUEUE


def _is_chosen(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _parent_run(plan: Any, state: Any, path: Path) -> None:
    """Have an MLflow run for the plan, to show its runs under; do without where the store does not answer."""
    from spikescale.scaling.tracking import parent_run

    state.parent_run = parent_run(plan, path, state.parent_run)
    state.write()


def _run(
    plan: Any, config: Path, state: Any, chosen: list[str], arguments: argparse.Namespace, extra: list[str]
) -> dict[str, str]:
    from spikescale.scaling.progress import PlanProgress
    from spikescale.scaling.scheduler import Resources, run_plan

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, frame: stopped.set())
    resources = Resources(
        cpus=arguments.threads,
        gpus=arguments.gpus,
        slots=arguments.workers * arguments.threads,
        address=arguments.ray_address,
    )
    with PlanProgress(plan, chosen) as progress:
        return run_plan(
            plan,
            config,
            state,
            resources,
            chosen,
            retries=arguments.retries,
            extra=extra,
            seconds=None if arguments.minutes is None else 60 * arguments.minutes,
            stopped=stopped,
            watcher=progress,
        )
