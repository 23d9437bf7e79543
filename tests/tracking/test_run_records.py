"""RunRecords: which MLflow run a resume continues, and an end that never raises."""

import json
from types import SimpleNamespace

import pytest

from spikescale.config import RunConfig
from spikescale.training import records as module
from spikescale.training.records import MLFLOW_FILE, RunRecords, run_address

ID = "0123456789abcdef"


class FakeRun:
    """Stands for MlflowRun: remembers how it was started and what it was given."""

    def __init__(self, uri, experiment, name, run_id=None, artifacts=None, on_start=None):
        self.uri, self.run_id, self.on_start = uri, run_id, on_start
        self.parameters, self.files, self.status = {}, [], None

    def set_tags(self, values):
        self.tags = values

    def log_parameters(self, values):
        self.parameters = values

    def log_metrics(self, values, step):
        pass

    def log_file(self, path):
        self.files.append(path.name)

    def finish(self, status):
        self.status = status


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start the records of a run with some settings, resumed from a step or not."""
    monkeypatch.setattr(module, "MlflowRun", FakeRun)
    data = SimpleNamespace(folders=str(tmp_path), sha256="abc", tokenizer=SimpleNamespace(kind="byte"))

    def start(resumed_at=None, **mlflow):
        config = RunConfig.model_validate(
            {"output": tmp_path / "runs", "data": {"path": tmp_path}, "mlflow": mlflow}
        )
        restored = None if resumed_at is None else {"step": resumed_at, "mlflow_run_id": None}
        return RunRecords(config, SimpleNamespace(is_main=True, world_size=1), data, restored)

    return start


def test_a_resume_continues_the_mlflow_run_that_the_folder_remembers(start):
    first = start()
    assert first._mlflow.run_id is None
    first._mlflow.on_start(ID)
    written = json.loads((first.folder / MLFLOW_FILE).read_text())
    assert written == {"run_id": ID, "uri": first.store}
    first.close("KILLED")

    again = start(resumed_at=0)
    assert again._mlflow.run_id == ID
    assert again._mlflow.parameters["train.steps"] == again.config.train.steps
    assert again._mlflow.files == ["config.yaml"]


def test_another_store_or_a_fresh_start_means_another_mlflow_run(start):
    start()._mlflow.on_start(ID)
    assert start(resumed_at=0, uri="http://127.0.0.1:9")._mlflow.run_id is None
    assert start(resumed_at=0)._mlflow.run_id == ID
    fresh = start()
    assert fresh._mlflow.run_id is None
    assert start(resumed_at=0)._mlflow.run_id is None  # forgotten by the fresh start


@pytest.mark.parametrize("content", ["{", "[]", '{"uri": 3}'])
def test_a_damaged_memory_starts_a_new_mlflow_run(start, content):
    (start().folder / MLFLOW_FILE).write_text(content)
    assert start(resumed_at=0)._mlflow.run_id is None


def test_a_full_disk_at_the_end_is_a_warning_and_the_mlflow_run_still_ends(start, monkeypatch, caplog):
    records = start()
    records.write({"step": 1, "loss": 2.0})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "plot_curves", full)
    records.close("FAILED")
    assert records._mlflow.status == "FAILED"
    assert "metrics.jsonl" in records._mlflow.files
    (record,) = caplog.records
    assert "curves.png" in record.message
    assert "No space left" in record.message


def test_the_address_of_a_server_is_its_url_without_the_password(start):
    assert dict(run_address(start(uri="https://me:secret@tracker:5000")))["MLflow"] == "https://tracker:5000"
    shown = dict(run_address(start()))["MLflow"]
    assert shown.startswith("mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///")
    assert "MLflow" not in dict(run_address(start(enabled=False)))
