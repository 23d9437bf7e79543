"""An MLflow run that never slows a step and never stops one.

Everything is handed to one background thread. When the store does not answer, that is said once,
what could not be sent waits in a bounded buffer and is sent when the store is back; what did not
arrive is counted and reported at the end.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikescale.tracking.delivery import RETRY_SECONDS, Delivery, one_line
from spikescale.tracking.mlflow_store import may_pass, open_client, probe, shown

log = logging.getLogger(__name__)

END_SECONDS = 30.0
SLOW_UPLOAD = 5e6  # bytes a second at which a model is waited for at the end
MAX_VALUE = 500  # characters that every MLflow store accepts in a parameter
MAX_BATCH = 100  # parameters that MLflow takes at once
NONFINITE = "nonfinite"  # metric: how many figures of a record were not numbers
GONE = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")


class StoreUnusableError(Exception):
    """The store answers but cannot hold this run; no later try would change that."""


class MlflowRun:
    """One MLflow run, written by a thread of its own.

    uri: tracking store, for example `sqlite:////data/mlflow.db` or a server's address.
    run_id: an earlier run to continue, replaced by a new one if the store does not have it; None
        starts a new one. The attribute of this name is None until the store has answered.
    artifacts: where a new experiment keeps its files; None leaves that to the store.
    on_start: called on the thread with the run's id, as soon as the store has given one.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str,
        run_id: str | None = None,
        artifacts: Path | None = None,
        on_start: Callable[[str], None] | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.uri, self.experiment, self.name = uri, experiment, name
        self.run_id = run_id
        self._artifacts, self._on_start = artifacts, on_start
        self._client: Any = None
        self._model_bytes = 0
        self._delivery = Delivery(
            shown(uri), self._start, lambda: probe(uri), lambda error: may_pass(error, uri), retry_seconds
        )

    def log_parameters(self, values: dict[str, Any]) -> None:
        """Record settings (cut at 500 characters, MLflow's limit).

        MLflow never changes a parameter: a continued run gets a tag `resumed.<key>` for each setting
        whose value is another than before.
        """
        wanted = {key: str(value)[:MAX_VALUE] for key, value in values.items()}

        def send() -> None:
            from mlflow.entities import Param, RunTag

            there = self._client.get_run(self.run_id).data
            new = [Param(key, value) for key, value in wanted.items() if key not in there.params]
            for start in range(0, len(new), MAX_BATCH):
                self._client.log_batch(self.run_id, params=new[start : start + MAX_BATCH])
            changed = [
                RunTag(f"resumed.{key}", value)
                for key, value in wanted.items()
                if key in there.params and value != there.tags.get(f"resumed.{key}", there.params[key])
            ]
            for start in range(0, len(changed), MAX_BATCH):
                self._client.log_batch(self.run_id, tags=changed[start : start + MAX_BATCH])

        self._delivery.put(send)

    def set_tags(self, values: dict[str, str]) -> None:
        """Record facts that are not settings."""

        def send() -> None:
            for key, value in values.items():
                self._client.set_tag(self.run_id, key, value)

        self._delivery.put(send)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Record numbers at an optimizer step, with the time of this call.

        NaN and infinity are left out and counted in the metric `nonfinite`: MLflow's SQL stores turn
        infinity into 1.8e308, which flattens the chart, and a NaN is a gap that nobody sees.
        """
        now = int(time.time() * 1000)
        numbers = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        if len(numbers) < len(values):
            numbers[NONFINITE] = float(len(values) - len(numbers))

        def send() -> None:
            from mlflow.entities import Metric

            self._client.log_batch(self.run_id, metrics=[Metric(k, v, now, step) for k, v in numbers.items()])

        self._delivery.put(send)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Copy a file to the run's artifacts, as it is when the thread gets to it."""
        self._delivery.put(lambda: self._client.log_artifact(self.run_id, str(path), folder), path.name)

    def register_model(self, folder: Path, name: str, tags: dict[str, str]) -> None:
        """Store a model folder with the run, and make a version of `name` in the registry of it."""

        def send() -> None:
            from spikescale.tracking.registry import register

            register(self._client, str(self.run_id), folder, name, tags)

        self._delivery.put(send, f"the model {name}")
        self._model_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def finish(self, status: str = "FINISHED", seconds: float = END_SECONDS) -> bool:
        """Send what is left for at most `seconds` and the time a model takes, end the run; whether all"
        " arrived."""
        patience = seconds + self._model_bytes / SLOW_UPLOAD
        return self._delivery.finish(lambda: self._client.set_terminated(self.run_id, status), patience)

    def _start(self) -> None:
        client = open_client(self.uri)
        experiment_id = self._experiment_id(client)
        run_id = self.run_id
        if run_id is not None and not _reopen(client, run_id):
            log.warning("MLflow at %s has no run %s any more; a new one starts", shown(self.uri), run_id)
            run_id = None
        if run_id is None:
            run_id = client.create_run(experiment_id, run_name=self.name).info.run_id
        self._client, self.run_id = client, run_id
        if self._on_start:
            try:
                self._on_start(run_id)
            except OSError as error:
                log.warning("a resumed run will start a new MLflow run: %s", one_line(error))

    def _experiment_id(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            location = self._artifacts.resolve().as_uri() if self._artifacts else None
            try:
                return str(client.create_experiment(self.experiment, location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(self.experiment)  # another run was faster
        if found is None or found.lifecycle_stage != "active":
            raise StoreUnusableError(
                f"experiment {self.experiment} is deleted there; restore it or set mlflow.experiment"
            )
        return str(found.experiment_id)


def _reopen(client: Any, run_id: str) -> bool:
    # Whether the run is there to be continued; it is then marked as running.
    from mlflow.exceptions import MlflowException

    try:
        if client.get_run(run_id).info.lifecycle_stage != "active":
            return False
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code in GONE:
            return False
        raise
    return True
