"""How far a plan is, for the person at the terminal: a bar over its compute, and a line for each run."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from spikescale.faults.exits import DONE, REQUEUE
from spikescale.scaling import outcomes
from spikescale.scaling.plan_file import Plan, PlannedRun
from spikescale.scaling.scheduler import Watcher
from spikescale.scaling.tables import console, duration

REFRESH_SECONDS = 5.0


class PlanProgress(Watcher):
    """Prints when runs begin and end; on a terminal also a bar with the time that is left."""

    def __init__(self, plan: Plan, chosen: Sequence[str]) -> None:
        self.plan = plan
        self._runs = [run for run in plan.runs if run.name in set(chosen)]
        self._began: dict[str, float] = {}
        self._shown = 0.0
        self._console = console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not sys.stdout.isatty(),
        )
        self._ended = {run.name for run in self._runs if outcomes.is_finished(plan, run)}
        total = sum(run.seconds for run in self._runs)
        self._task = self._bar.add_task(plan.name, total=total)
        self._bar.update(self._task, completed=self._done([]))

    def __enter__(self) -> "PlanProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def _done(self, running: Sequence[PlannedRun]) -> float:
        done = sum(run.seconds for run in self._runs if run.name in self._ended)
        for run in running:
            skipped = run.branch_step or 0
            share = max(0, outcomes.steps_done(self.plan, run) - skipped) / (run.steps - skipped)
            done += run.seconds * share
        return done

    def started(self, run: PlannedRun) -> None:
        """See Watcher."""
        self._began[run.name] = time.monotonic()

    def ended(self, run: PlannedRun, code: int, reason: str) -> None:
        """See Watcher."""
        seconds = duration(time.monotonic() - self._began[run.name])
        if code == DONE:
            self._ended.add(run.name)
            points = outcomes.points_of(self.plan, run)
            loss = f", loss {points[-1].loss:.4f}" if points else ""
            text = f"{run.name}: done in {seconds}{loss}  ({len(self._ended)} of {len(self._runs)})"
        elif code == REQUEUE:
            text = f"{run.name}: saved and stopped after {seconds}"
        else:
            text = f"{run.name}: failed after {seconds}: {reason}"
        self._bar.print(text, markup=False)

    def tick(self, running: Sequence[PlannedRun]) -> None:
        """See Watcher."""
        if self._bar.disable or time.monotonic() - self._shown < REFRESH_SECONDS:
            return
        self._shown = time.monotonic()
        names = ", ".join(run.name for run in running)
        self._bar.update(self._task, completed=self._done(running), description=f"{self.plan.name}: {names}")
