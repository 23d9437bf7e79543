"""Where tasks run: in this process, or in a pool of Ray actors."""

import contextlib
import logging
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from spikescale.data_pipeline import stages
from spikescale.errors import UserError

POLL_SECONDS = 0.5
DEATHS = 4  # of workers over one task, before it is given up
DEATH_PAUSE_SECONDS = 0.25  # after the first of them, twice as long after each further one
HOLD_SECONDS = 0.05  # between two questions whether the next task may begin

logger = logging.getLogger(__name__)


class Task(Protocol):
    """A work item, picklable."""

    def run(self, report: Any) -> Any:
        """Do it, calling `report(documents, tokens, bytes)` now and then."""
        ...


class Listener(Protocol):
    """Is told how far a pool is."""

    def advance(self, documents: int, tokens: int, text_bytes: int) -> None:
        """So much more was done."""
        ...

    def task_done(self, index: int) -> None:
        """The task with this position is finished."""
        ...


class Supervisor:
    """What a pool asks and tells while it works; this one lets everything pass."""

    def admits(self, index: int) -> bool:
        """Whether the task with this position may begin now; those after it wait with it."""
        return True

    def finished(self, index: int, result: Any, seconds: dict[str, float]) -> None:
        """The task with this position has this result; `seconds` went to each stage (stages.py)."""


class Pool(Protocol):
    """Runs tasks."""

    def run(
        self, tasks: Sequence[Task], listener: Listener, supervisor: Supervisor | None = None
    ) -> list[Any]:
        """Results in the order of the tasks. The first UserError of a task is raised here."""
        ...


class SerialPool:
    """Runs tasks one after another in this process."""

    def run(
        self, tasks: Sequence[Task], listener: Listener, supervisor: Supervisor | None = None
    ) -> list[Any]:
        """See Pool."""
        supervisor = supervisor or Supervisor()
        results = []
        for index, task in enumerate(tasks):
            while not supervisor.admits(index):
                time.sleep(HOLD_SECONDS)
            stages.take()
            results.append(task.run(listener.advance))
            listener.task_done(index)
            supervisor.finished(index, results[-1], stages.take())
        return results


class Worker:
    """The actor: runs one task at a time, and says meanwhile how far it is."""

    def __init__(self) -> None:
        # One core each; the tokenizers' thread pools would otherwise take all of them, every one.
        os.environ["RAYON_NUM_THREADS"] = "1"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._counts = [0, 0, 0]

    def execute(self, task: Task) -> tuple[bool, Any, list[int], dict[str, float]]:
        """Whether it went well, the result (or the line of the UserError), progress, seconds a stage."""
        stages.take()
        try:
            return True, task.run(self._count), self._counts, stages.take()
        except UserError as error:
            # As a value: Ray wraps raised exceptions in a traceback of many lines.
            return False, str(error), self._counts, stages.take()

    def progress(self) -> list[int]:
        """Documents, tokens and bytes since the actor started."""
        return self._counts

    def _count(self, *amounts: int) -> None:
        self._counts = [total + amount for total, amount in zip(self._counts, amounts, strict=True)]


class RayPool:
    """Runs tasks on Ray actors. One that dies, or whose node is lost, is replaced and its task repeated.

    Not left to Ray's own restarts: while a node goes down, its retries are used up within a second.

    Args:
        workers: how many actors, of one core each.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(
        self, tasks: Sequence[Task], listener: Listener, supervisor: Supervisor | None = None
    ) -> list[Any]:
        """See Pool."""
        import ray

        if not tasks:
            return []
        actor = ray.remote(Worker).options(num_cpus=1, max_restarts=0, max_task_retries=0, max_concurrency=2)
        workers = [actor.remote() for _ in range(min(self._workers, len(tasks)))]
        try:
            return self._run(tasks, workers, actor.remote, listener, supervisor or Supervisor())
        finally:
            for worker in workers:
                with contextlib.suppress(ray.exceptions.RaySystemError):  # it was never there
                    ray.kill(worker)

    def _run(
        self,
        tasks: Sequence[Task],
        workers: list[Any],
        new_worker: Callable[[], Any],
        listener: Listener,
        supervisor: Supervisor,
    ) -> list[Any]:
        import ray

        results: list[Any] = [None] * len(tasks)
        seen = [[0, 0, 0] for _ in workers]
        waiting = deque(enumerate(tasks))
        idle = deque(range(len(workers)))
        running: dict[Any, tuple[int, int]] = {}
        asked: dict[Any, int] = {}
        deaths = [0] * len(tasks)

        def start(index: int, position: int) -> None:
            try:
                running[workers[position].execute.remote(tasks[index])] = (index, position)
            except ray.exceptions.RaySystemError as error:
                raise UserError(_given_up(index, " ".join(str(error).split()))) from None

        def submit() -> None:
            while waiting and idle and supervisor.admits(waiting[0][0]):
                start(waiting.popleft()[0], idle.popleft())
            while not waiting and idle:
                # Nothing is left for it: its core may be what a worker of a lost node is waiting for.
                ray.kill(workers[idle.popleft()])

        def advance(position: int, counts: list[int]) -> None:
            # A new worker counts from zero again; what it repeats is not reported twice.
            steps = [max(0, new - old) for new, old in zip(counts, seen[position], strict=True)]
            seen[position] = [max(new, old) for new, old in zip(counts, seen[position], strict=True)]
            listener.advance(*steps)

        while waiting or running:
            submit()
            if not running:
                time.sleep(HOLD_SECONDS)
                continue
            patience = HOLD_SECONDS if waiting and idle else POLL_SECONDS
            done, _ = ray.wait(list(running), num_returns=1, timeout=patience)
            for reference in done:
                index, position = running.pop(reference)
                try:
                    well, result, counts, seconds = ray.get(reference)
                except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError) as error:
                    deaths[index] += 1
                    if deaths[index] == DEATHS:
                        raise UserError(_given_up(index, " ".join(str(error).split()))) from None
                    logger.warning("partition %d: its Ray worker died, a new one repeats it", index)
                    with contextlib.suppress(ray.exceptions.RaySystemError):
                        ray.kill(workers[position])  # it may be cut off from here only
                    # Where it ran may still be going down, and take the new one along.
                    time.sleep(DEATH_PAUSE_SECONDS * 2 ** (deaths[index] - 1))
                    asked = {asking: other for asking, other in asked.items() if other != position}
                    workers[position] = new_worker()
                    start(index, position)
                    continue
                if not well:
                    raise UserError(result)
                advance(position, counts)
                results[index] = result
                idle.append(position)
                listener.task_done(index)
                supervisor.finished(index, result, seconds)
            if not done:
                answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
                for reference in answered:
                    position = asked.pop(reference)
                    with contextlib.suppress(ray.exceptions.RayError):
                        advance(position, ray.get(reference))
                for position in {position for _, position in running.values()} - set(asked.values()):
                    with contextlib.suppress(ray.exceptions.RaySystemError):
                        asked[workers[position].progress.remote()] = position
        return results


def _given_up(index: int, reason: str) -> str:
    """The line of an error about workers that died, by what Ray says of the last one."""
    if "all references to the actor were removed" in reason or "Actor creation cancelled" in reason:
        # This process holds the reference: what failed is Ray's asking for it.
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        return (
            f"partition {index}: the Ray cluster gets no answer from this process and ends its workers; "
            f"RAY_AUTH_MODE (here: {mode}) and the token must be those the cluster was started with"
        )
    return f"partition {index}: its Ray worker died again and again ({reason[:200]})"


def _agree_on_token(address: str | None) -> None:
    """Have one token on this machine, and show it to a cluster that was started where it is known.

    Ray asks for a token where RAY_AUTH_MODE says so. Unset, a local Ray turns the mode on and writes a token
    into the home folder, each process its own if two begin at once; `ray start` turns it on where there is a
    token; connecting leaves it off, and a cluster that asks refuses. What the environment says stays.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or "ray" in sys.modules:
        return  # chosen by the user, or too late: Ray reads it when it is imported
    known = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    path = Path.home() / ".ray" / "auth_token"
    if address is None and not known and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".auth_token-{os.getpid()}")
        aside.touch(mode=0o600)
        aside.write_text(secrets.token_hex(32), encoding="ascii")
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)  # whole, and the first one stays
        aside.unlink()
    if known or path.exists():
        os.environ["RAY_AUTH_MODE"] = "token"


@contextlib.contextmanager
def ray_running(cpus: int, address: str | None = None, otherwise: str = "") -> Iterator[dict[str, float]]:
    """Ray as this process has it, or the cluster at `address`, or a fresh local one: its resources by name.

    It is shut down at the end if it was started here. `otherwise` tells what works without it. Raises
    UserError when it cannot be reached.
    """
    # These are read by Ray when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _agree_on_token(address)
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"Ray is not installed ({error}): install it{otherwise and f'; {otherwise}'}"
        ) from None
    started = not ray.is_initialized()
    if started:
        began = time.monotonic()
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if address is None:
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
            else:
                ray.init(address=address, **quiet)
        except Exception as error:  # Ray raises ConnectionError, RuntimeError and its own kinds
            where = f"the Ray cluster at {address}" if address else "a local Ray"
            reason = " ".join(str(error).split())[:300]
            token = (
                "; its token is needed here too (RAY_AUTH_TOKEN_PATH), if it asks for one" if address else ""
            )
            raise UserError(
                f"cannot start or reach {where} ({reason}){token}{otherwise and f'; {otherwise}'}"
            ) from None
        logger.info("Ray is up after %.1f s", time.monotonic() - began)
    try:
        yield ray.cluster_resources()
    finally:
        if started:
            ray.shutdown()


@contextlib.contextmanager
def ray_pool(workers: int, address: str | None = None, others: int = 0) -> Iterator[RayPool]:
    """A pool on `ray_running`. Raises UserError when Ray cannot be reached.

    others: processes that hold cores of the same cluster as long as this pool does: their part is left free,
    or whoever comes last would wait for ever.
    """
    with ray_running(workers, address, "--no-ray works without") as resources:
        cores = int(resources.get("CPU", 0))
        if others:
            cores = cores * workers // (workers + others)
            if not cores:
                raise UserError(
                    f"the Ray cluster at {address} has too few cores for {workers + others} workers of the"
                    " streams on it: it takes one for each stream at least"
                )
        if cores < workers:
            logger.warning(
                "%d workers asked for, the Ray cluster has %d cores for them: using %d",
                workers,
                cores,
                max(cores, 1),
            )
        yield RayPool(max(1, min(workers, cores)))
