"""What the runs of a plan have left behind: which are done, and the points they give."""

from pathlib import Path
from typing import Any

from spikescale.faults.events import read_events
from spikescale.scaling.plan_file import Plan, PlannedRun
from spikescale.scaling.points import Point
from spikescale.tracking.metrics_file import read_metrics

METRICS = "metrics.jsonl"


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics file; none when there is no file yet."""
    path = folder / METRICS
    return read_metrics(path) if path.is_file() and path.stat().st_size else []


def is_finished(plan: Plan, run: PlannedRun) -> bool:
    """Whether the run has trained all its steps and ended well, and is not to be repeated."""
    folder = plan.folder(run)
    events = read_events(folder) if (folder / "events.jsonl").is_file() else []
    return any(event["event"] == "end" and event["step"] == run.steps for event in events)


def steps_done(plan: Plan, run: PlannedRun) -> int:
    """Steps of the run that were recorded so far."""
    records = records_of(plan.folder(run))
    return min(run.steps, int(records[-1]["step"])) if records else 0


def points_of(plan: Plan, run: PlannedRun) -> list[Point]:
    """The validation losses of a run as points; the last one of a finished run is final.

    Before its decay a run's loss is that of a rate which no run of that length would end with: such points,
    and all of a trunk, are not final.
    """
    records = records_of(plan.folder(run))
    step_tokens = run.tokens // run.steps
    finished = is_finished(plan, run)
    firing: float | None = None
    points = []
    for record in records:
        firing = record.get("firing_rate", firing)
        loss = record.get("valid_loss")
        if loss is None or record["step"] == 0:
            continue
        tokens = float(record["step"] * step_tokens)
        points.append(
            Point(
                parameters=float(run.parameters),
                parameters_non_embedding=float(run.parameters_non_embedding),
                tokens=tokens,
                loss=float(loss),
                flop=run.flop_per_token * tokens,
                run=run.name,
                family=run.family,
                budget=run.budget,
                final=finished and record["step"] == run.steps and run.kind != "trunk",
                lr=run.lr,
                firing_rate=firing,
                unique_tokens=float(plan.train_tokens),
            )
        )
    return points


def points_of_plan(plan: Plan) -> list[Point]:
    """The points of all runs whose loss was measured on as many tokens of the split as any other's.

    A plan that was given more --evaluate-tokens halfway has losses of another text before.
    """
    measured = {run.name: _validated(plan, run) for run in plan.runs}
    most = max((count for counts in measured.values() for count in counts.values()), default=0)
    return [
        point
        for run in plan.runs
        for point in points_of(plan, run)
        if measured[run.name].get(round(point.tokens * run.steps / run.tokens), 0) == most
    ]


def _validated(plan: Plan, run: PlannedRun) -> dict[int, int]:
    """Tokens that the validation after each step read; 0 where a record does not say."""
    records = records_of(plan.folder(run))
    return {r["step"]: r.get("valid_tokens", 0) for r in records if r.get("valid_loss") is not None}
