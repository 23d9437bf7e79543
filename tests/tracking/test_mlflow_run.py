"""MLflow gets everything, late if need be, and never stops the training."""

import logging

import pytest

from spikescale.tracking import mlflow_run
from spikescale.tracking.mlflow_run import MlflowRun

pytestmark = pytest.mark.slow


def stored(uri, run_id):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    losses = [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")]
    return run, losses, {f.path for f in client.list_artifacts(run_id)}


def test_run_arrives_and_is_continued(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    note = tmp_path / "note.txt"
    note.write_text("hello")
    run = MlflowRun(uri, "tests", "first", artifacts=tmp_path / "artifacts")
    run.log_parameters({"train.lr": 0.5, "long": "x" * 9000})
    run.set_tags({"data.manifest_sha256": "abc"})
    run.log_metrics({"train/loss": 3.0}, step=1)
    run.log_file(note)
    assert run.finish(seconds=120)
    again = MlflowRun(uri, "tests", "first", run_id=run.run_id, artifacts=tmp_path / "artifacts")
    again.log_metrics({"train/loss": 2.0}, step=2)
    assert again.finish(seconds=120)

    found, losses, files = stored(uri, run.run_id)
    assert losses == [(1, 3.0), (2, 2.0)]
    assert found.data.params["train.lr"] == "0.5"
    assert len(found.data.params["long"]) == mlflow_run.MAX_VALUE
    assert found.data.tags["data.manifest_sha256"] == "abc"
    assert found.info.status == "FINISHED"
    assert files == {"note.txt"}


def test_a_store_that_is_down_is_announced_once_and_gets_everything_when_it_is_back(tmp_path, caplog):
    blocked = tmp_path / "store"
    blocked.write_text("a file where the store's folder should be")
    uri = f"sqlite:///{blocked}/mlflow.db"
    with caplog.at_level(logging.WARNING, logger=mlflow_run.__name__):
        run = MlflowRun(uri, "tests", "late", artifacts=tmp_path / "artifacts", retry_seconds=0.2)
        for step in range(1, 4):
            run.log_metrics({"train/loss": float(step)}, step=step)
        assert not run.wait_started(8)
        blocked.unlink()
        blocked.mkdir()
        assert run.wait_started(120)
        assert run.finish(seconds=120)
    assert [r.message for r in caplog.records if "does not answer" in r.message].__len__() == 1
    assert stored(uri, run.run_id)[1] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_store_that_stays_down_ends_the_run_with_a_count(tmp_path, caplog):
    blocked = tmp_path / "store"
    blocked.write_text("")
    run = MlflowRun(f"sqlite:///{blocked}/mlflow.db", "tests", "lost", retry_seconds=0.2)
    run.log_metrics({"train/loss": 1.0}, step=1)
    with caplog.at_level(logging.WARNING, logger=mlflow_run.__name__):
        assert not run.finish(seconds=1)
    assert "did not arrive" in caplog.text
