"""An MLflow run that never slows a step and never stops one.

Everything is handed to one background thread. When the store does not answer, that is said once,
what could not be sent waits in a bounded buffer and is sent when the store is back; what the buffer
could not hold is counted and reported at the end.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

BUFFER = 100_000  # records
RETRY_SECONDS = 5.0
END_SECONDS = 30.0
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # answers that a second try would get again
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages show training, not GenAI
MAX_VALUE = 500  # characters that every MLflow store accepts in a parameter


class MlflowRun:
    """One MLflow run, written by a thread of its own.

    uri: tracking store, for example `sqlite:////data/mlflow.db` or a server's address.
    run_id: an earlier run to continue; None starts a new one.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str,
        run_id: str | None = None,
        artifacts: Path | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.uri, self.experiment, self.name = uri, experiment, name
        self.run_id = run_id
        self.lost = 0
        self._artifacts = artifacts
        self._retry_seconds = retry_seconds
        self._client: Any = None
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=BUFFER)
        self._ending = threading.Event()
        self._started = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def wait_started(self, seconds: float) -> bool:
        """Wait until the run exists in the store, at most `seconds`; whether it does."""
        return self._started.wait(seconds)

    def log_parameters(self, values: dict[str, Any]) -> None:
        """Record settings (cut at 500 characters, MLflow's limit)."""
        from_mlflow = [(key, str(value)[:MAX_VALUE]) for key, value in values.items()]

        def send() -> None:
            from mlflow.entities import Param

            params = [Param(key, value) for key, value in from_mlflow]
            for start in range(0, len(params), 100):
                self._client.log_batch(self.run_id, params=params[start : start + 100])

        self._put(send)

    def set_tags(self, values: dict[str, str]) -> None:
        """Record facts that are not settings."""

        def send() -> None:
            for key, value in values.items():
                self._client.set_tag(self.run_id, key, value)

        self._put(send)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Record numbers at an optimizer step, with the time of this call."""
        now = int(time.time() * 1000)

        def send() -> None:
            from mlflow.entities import Metric

            self._client.log_batch(
                self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()]
            )

        self._put(send)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Copy a file to the run's artifacts, as it is when the thread gets to it."""
        self._put(lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def finish(self, status: str = "FINISHED", seconds: float = END_SECONDS) -> bool:
        """Send what is left for at most `seconds`, end the run; whether everything arrived."""
        self._put(lambda: self._client.set_terminated(self.run_id, status))
        self._put(None)
        self._ending.set()
        self._thread.join(seconds)
        left = self._queue.qsize()
        if self._thread.is_alive() or self.lost:
            log.warning(
                "MLflow at %s: %d records did not arrive; metrics.jsonl has them", self.uri, left + self.lost
            )
            return False
        return True

    def _put(self, send: Callable[[], None] | None) -> None:
        try:
            self._queue.put_nowait(send)
        except queue.Full:
            self.lost += 1

    def _work(self) -> None:
        self._until_done(self._start)
        self._started.set()
        while (send := self._queue.get()) is not None:
            self._until_done(send)

    def _until_done(self, send: Callable[[], None]) -> None:
        while True:
            try:
                send()
                return
            except Exception as error:  # whatever a store or the network throws must not reach the training
                if getattr(error, "error_code", None) in REFUSALS:
                    log.warning(
                        "MLflow at %s refuses a record: %s", self.uri, " ".join(str(error).split())[:200]
                    )
                    self.lost += 1
                    return
                if not self._warned:
                    self._warned = True
                    text = " ".join(str(error).split())[:200]
                    log.warning(
                        "MLflow at %s does not answer (%s); training goes on, metrics wait", self.uri, text
                    )
            time.sleep(self._retry_seconds)

    def _start(self) -> None:
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            location = self._artifacts.resolve().as_uri() if self._artifacts else None
            experiment_id = client.create_experiment(self.experiment, location, tags=KIND)
        else:
            experiment_id = experiment.experiment_id
        if self.run_id is not None:
            client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = client.create_run(experiment_id, run_name=self.name).info.run_id
        self._client = client


def default_store(output: Path) -> str:
    """The local store used when no other is set: a SQLite file in the folder of all runs."""
    return f"sqlite:///{output.resolve()}/mlflow.db"
