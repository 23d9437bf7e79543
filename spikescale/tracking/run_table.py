"""The runs of an MLflow store as rows, whatever started them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spikescale.errors import UserError
from spikescale.tracking.mlflow_store import open_client, shown

LOSS, VALID, BITS, FIRING = "loss/train", "loss/valid", "loss/valid_bits_per_byte", "neurons/mean_firing_rate"
TOKENS, SPEED = "optimizer/tokens", "speed/tokens_per_second"
PAGE = 500


@dataclass(frozen=True)
class Run:
    """One run. seconds: None while it runs."""

    id: str
    name: str
    experiment: str
    status: str
    started: float
    seconds: float | None
    settings: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


class RunStore:
    """Reads a store. Raises UserError, naming the store, where it cannot be read."""

    def __init__(self, uri: str) -> None:
        from mlflow.exceptions import MlflowException

        self.uri, self._errors = uri, (MlflowException, OSError)
        self._client: Any = open_client(uri)
        try:
            self._experiments = {e.experiment_id: e.name for e in self._client.search_experiments()}
        except self._errors as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: BaseException) -> UserError:
        return UserError(f"MLflow at {shown(self.uri)}: {' '.join(str(error).split())[:200]}")

    def runs(self, experiment: str | None = None, wanted: str = "", limit: int | None = None) -> list[Run]:
        """The newest runs, of an experiment or of all, that MLflow's filter `wanted` lets pass."""
        ids = [number for number, name in self._experiments.items() if experiment in (None, name)]
        if not ids:
            known = ", ".join(sorted(self._experiments.values()))
            raise UserError(f"--experiment {experiment}: not in {shown(self.uri)}; there are {known}")
        found: list[Run] = []
        token = None
        while limit is None or len(found) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            try:
                page = self._client.search_runs(
                    ids, wanted, max_results=size, order_by=["attributes.start_time DESC"], page_token=token
                )
            except self._errors as error:
                raise self._unreadable(error) from None
            found += [self._run(run) for run in page]
            token = page.token
            if not token:
                break
        return found

    def named(self, word: str) -> Run:
        """The run with this id, this beginning of an id, or this name (of several the newest)."""
        everything = self.runs()
        matching = [run for run in everything if run.id == word] or [
            run for run in everything if len(word) >= 4 and run.id.startswith(word)
        ]
        matching = matching or [run for run in everything if run.name == word]
        if not matching:
            raise UserError(
                f"{word}: no run of this id or name in {shown(self.uri)}; see spikescale runs list"
            )
        return matching[0]

    def history(self, run: Run, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, by step."""
        try:
            found = self._client.get_metric_history(run.id, metric)
        except self._errors as error:
            raise self._unreadable(error) from None
        return sorted({point.step: float(point.value) for point in found}.items())

    def _run(self, run: Any) -> Run:
        info = run.info
        return Run(
            info.run_id,
            info.run_name,
            self._experiments.get(info.experiment_id, info.experiment_id),
            info.status,
            info.start_time / 1000,
            None if info.end_time is None else (info.end_time - info.start_time) / 1000,
            dict(run.data.params),
            dict(run.data.metrics),
            dict(run.data.tags),
        )


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings that the runs do not share, without those that name a run or its place."""
    keys = sorted({key for run in runs for key in run.settings})
    hidden = ("name", "output", "mlflow.", "branch_from")
    return [
        key for key in keys if not key.startswith(hidden) and len({run.settings.get(key) for run in runs}) > 1
    ]


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A curve in one line of text, its largest value the highest."""
    if not values:
        return ""
    picked = [
        values[round(i * (len(values) - 1) / max(min(width, len(values)) - 1, 1))]
        for i in range(min(width, len(values)))
    ]
    low, high = min(picked), max(picked)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[round((value - low) / ((high - low) or 1) * (len(blocks) - 1))] for value in picked)
