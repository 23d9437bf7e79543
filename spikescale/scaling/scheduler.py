"""Runs a plan on Ray: several runs side by side, each in its turn, none twice.

A run whose folder says that it ended is done. One that was interrupted resumes from its checkpoint, a branch
waits for its trunk, and one that fails is tried again and then marked, which also marks its branches.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.pools import ray_running
from spikescale.errors import UserError
from spikescale.faults.exits import BAD_INPUT, REQUEUE
from spikescale.files import read_json, write_json
from spikescale.scaling import outcomes
from spikescale.scaling.plan_file import Plan, PlannedRun

STATE = "state.json"  # in the plan's output folder
STOP = "stop"  # a file there: runs that see it save and end
WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """One attempt at a run, as it travels to a worker."""

    config: str
    settings: tuple[str, ...]
    folder: str
    ranks: int
    stop: str


@dataclass
class State:
    """What is remembered between calls besides the runs' own folders."""

    path: Path
    failures: dict[str, list[str]] = field(default_factory=dict)  # a line for each failed attempt
    parent_run: str | None = None

    @classmethod
    def read(cls, path: Path) -> "State":
        """The state in a file, or an empty one. Raises UserError when it is damaged."""
        if not path.exists():
            return cls(path)
        content = read_json(path)
        failures = content.get("failures") if isinstance(content, dict) else None
        if not isinstance(failures, dict):
            raise UserError(f"{path}: has no failures by run; remove it to forget which runs failed")
        return cls(path, failures, content.get("parent_run"))

    def write(self) -> None:
        """Keep it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"failures": self.failures, "parent_run": self.parent_run})


@dataclass(frozen=True)
class Resources:
    """cpus: CPUs that Ray gives a rank. gpus: whether each rank takes a GPU. slots: CPUs of a local Ray."""

    cpus: int = 1
    gpus: bool = False
    slots: int = 1
    address: str | None = None


class Watcher:
    """Is told what happens; this one is silent."""

    def started(self, run: PlannedRun) -> None:
        """A run begins or resumes."""

    def ended(self, run: PlannedRun, code: int, reason: str) -> None:
        """A run ended with an exit code; the reason is empty when it ended well."""

    def tick(self, running: Sequence[PlannedRun]) -> None:
        """About once a second."""


def status_of(plan: Plan, state: State, retries: int) -> dict[str, str]:
    """finished, failed, blocked (its trunk failed), started or open, by run."""
    found: dict[str, str] = {}
    for run in plan.runs:
        if outcomes.is_finished(plan, run):
            found[run.name] = "finished"
        elif len(state.failures.get(run.name, [])) > retries:
            found[run.name] = "failed"
        elif run.branch_from is not None and found.get(run.branch_from) in ("failed", "blocked"):
            found[run.name] = "blocked"
        else:
            found[run.name] = "started" if (plan.folder(run) / "checkpoints").is_dir() else "open"
    return found


def execute(job: Job) -> tuple[int, str]:
    """On a worker: run the attempt to its end; (exit code, the end of what it said)."""
    from spikescale.scaling.child import run_to_end

    stop = Path(job.stop)
    return run_to_end(Path(job.config), job.settings, Path(job.folder), job.ranks, stop.exists)


def run_plan(
    plan: Plan,
    config: Path,
    state: State,
    resources: Resources,
    chosen: Sequence[str],
    retries: int = 1,
    extra: Sequence[str] = (),
    seconds: float | None = None,
    stopped: threading.Event | None = None,
    watcher: Watcher | None = None,
) -> dict[str, str]:
    """Run what is open of the `chosen` runs; the status of every run of the plan afterwards.

    config: the file of the plan's base settings. extra: words for every run. seconds: after which running
    ones are told to save and to end. Raises UserError for settings that no run could start with.
    """
    watcher, stopped = watcher or Watcher(), stopped or threading.Event()
    stop = plan.output / STOP
    plan.output.mkdir(parents=True, exist_ok=True)
    stop.unlink(missing_ok=True)
    if not any(status_of(plan, state, retries)[name] in ("open", "started") for name in chosen):
        return status_of(plan, state, retries)
    end = None if seconds is None else time.monotonic() + seconds
    with ray_running(resources.slots, resources.address) as cluster:
        _Scheduler(plan, config, state, resources, set(chosen), retries, extra, stop, watcher).run(
            cluster, lambda: stopped.is_set() or (end is not None and time.monotonic() > end)
        )
    stop.unlink(missing_ok=True)
    return status_of(plan, state, retries)


class _Scheduler:
    def __init__(
        self,
        plan: Plan,
        config: Path,
        state: State,
        resources: Resources,
        chosen: set[str],
        retries: int,
        extra: Sequence[str],
        stop: Path,
        watcher: Watcher,
    ) -> None:
        self.plan, self.config, self.state, self.resources = plan, config, state, resources
        self.chosen, self.retries, self.extra, self.stop, self.watcher = chosen, retries, extra, stop, watcher
        self.running: dict[Any, PlannedRun] = {}

    def run(self, cluster: Any, over: Callable[[], bool]) -> None:
        """Start what can be started and wait, until nothing is left or `over` says so."""
        import ray

        cpus, gpus = (int(cluster.get(key, 0)) for key in ("CPU", "GPU"))
        remote = ray.remote(max_retries=0)(execute)
        stopping = False
        while True:
            if not stopping and over():
                stopping = True
                self.stop.touch()
            if not stopping:
                self._start_ready(remote, cpus, gpus)
            if not self.running:
                return
            done, _ = ray.wait(list(self.running), num_returns=1, timeout=WAIT_SECONDS)
            for reference in done:
                self._end(reference)
            self.watcher.tick(list(self.running.values()))

    def _start_ready(self, remote: Any, cpus: int, gpus: int) -> None:
        status = status_of(self.plan, self.state, self.retries)
        names = {run.name for run in self.running.values()}
        ready = [
            run
            for run in self.plan.runs
            if run.name in self.chosen
            and run.name not in names
            and status[run.name] in ("open", "started")
            and (run.branch_from is None or self._trunk_has(run, status))
        ]
        # What takes longest first: small ones fill the gaps at the end.
        for run in sorted(ready, key=lambda run: -self._weight(run)):
            needs = run.ranks * self.resources.cpus
            if needs > cpus or (self.resources.gpus and run.ranks > gpus):
                raise UserError(
                    f"{run.name}: needs {needs} CPUs and {run.ranks if self.resources.gpus else 0} GPUs,"
                    f" Ray has"
                    f" {cpus} and {gpus}"
                )
            used = sum(other.ranks for other in self.running.values())
            if used * self.resources.cpus + needs > cpus:
                continue
            if self.resources.gpus and used + run.ranks > gpus:
                continue
            self._start(remote, run, needs)

    def _trunk_has(self, run: PlannedRun, status: dict[str, str]) -> bool:
        # The checkpoint is enough: branches need not wait for the end of a long trunk.
        if status[str(run.branch_from)] == "finished":
            return True
        trunk = self.plan.output / str(run.branch_from)
        return (trunk / "checkpoints" / f"step-{run.branch_step:08d}").is_dir()

    def _weight(self, run: PlannedRun) -> float:
        branches = [other.seconds for other in self.plan.runs if other.branch_from == run.name]
        return run.seconds + max(branches, default=0.0)

    def _start(self, remote: Any, run: PlannedRun, cpus: int) -> None:
        settings = [*self.plan.settings(run), *self.extra]
        if not any(word.startswith("train.threads=") for word in settings):
            settings.append(f"train.threads={self.resources.cpus}")
        settings += [f"mlflow.parent_run={self.state.parent_run}"] if self.state.parent_run else []
        settings += [
            f"mlflow.tags.scaling_plan={self.plan.name}",
            f"mlflow.tags.scaling_kind={run.kind}",
            f"mlflow.tags.scaling_parameters='{run.parameters}'",
            f"mlflow.tags.scaling_parameters_non_embedding='{run.parameters_non_embedding}'",
            f"mlflow.tags.scaling_flop_per_token='{run.flop_per_token}'",
        ]
        job = Job(
            str(self.config.resolve()),
            tuple(settings),
            str(self.plan.folder(run)),
            run.ranks,
            str(self.stop.resolve()),
        )
        options: dict[str, Any] = {"num_cpus": cpus}
        if self.resources.gpus:
            options["num_gpus"] = run.ranks
        self.running[remote.options(**options).remote(job)] = run
        self.watcher.started(run)

    def _end(self, reference: Any) -> None:
        import ray

        run = self.running.pop(reference)
        try:
            code, said = ray.get(reference)
        except ray.exceptions.RayError as error:  # its worker died: memory, or a node that went away
            code, said = 1, " ".join(str(error).split())
        reason = ""
        if code not in (0, REQUEUE):
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            named = [line for line in lines if line.startswith("error: ")]
            reason = f"code {code}: {(named or lines or ['nothing was said'])[-1]}"[:300]
            failures = self.state.failures.setdefault(run.name, [])
            failures.append(reason)
            if code == BAD_INPUT:  # the same at every start
                failures += [reason] * max(0, self.retries + 1 - len(failures))
            self.state.write()
        elif code == 0 and not outcomes.is_finished(self.plan, run):
            code, reason = 1, "ended well but left no record of its end"
            self.state.failures.setdefault(run.name, []).append(reason)
            self.state.write()
        self.watcher.ended(run, code, reason)
