"""A real MLflow server that goes down while a run trains and comes back: every metric arrives, in order."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from launching import free_port
from processes import end, records, start, until

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


class Server:
    """`mlflow server` on loopback, over a SQLite file that outlives it."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = f"sqlite:///{folder}/server.db"
        self._artifacts = folder / "artifacts"
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        command = [str(Path(sys.executable).parent / "mlflow"), "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self._artifacts)]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
        until(self.answers)

    def down(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)  # the server's own group: it has workers
            self._process.wait()
            self._process = None

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False


def test_metrics_of_the_time_without_a_server_arrive_late_and_in_order(make_run_file, tmp_path):
    server = Server(tmp_path)
    server.up()
    try:
        folder = tmp_path / "runs" / "run"
        words = ["--config", str(make_run_file(tmp_path)), "mlflow.enabled=true", f"mlflow.uri={server.uri}"]
        process = start([*words, "faults.inject=pause@3;pause@10"])
        until(lambda: (folder / "mlflow_run.json").exists() and waits(folder, 3))
        server.down()
        (folder / "continue").touch()
        until(lambda: waits(folder, 10))
        server.up()
        (folder / "continue").touch()
        code, _, err = end(process)
        assert code == 0
        assert "did not arrive" not in err
    finally:
        server.down()

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.store)
    (found,) = client.search_runs([client.get_experiment_by_name("spikescale").experiment_id])
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss/train")
    assert [metric.step for metric in history] == list(range(1, 13))
    assert [metric.value for metric in history] == [r["loss"] for r in records(folder) if "loss" in r]


def waits(folder: Path, step: int) -> bool:
    return (folder / "injected" / f"pause@{step}-rank0").exists()
