"""MLflow gets everything, late if need be, and never stops the training."""

import logging
import math
import time

import pytest

from spikescale.tracking import delivery, mlflow_run
from spikescale.tracking.mlflow_run import MlflowRun

pytestmark = pytest.mark.slow


def client_of(uri):
    from spikescale.tracking.mlflow_store import open_client

    return open_client(uri)


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stored(uri, run_id):
    client = client_of(uri)
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


def test_a_continued_run_shows_the_settings_that_changed(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = MlflowRun(uri, "tests", "run", artifacts=tmp_path / "artifacts")
    first.log_parameters({"lr": 0.5, "steps": 10})
    assert first.finish(seconds=120)
    for lr in (0.25, 0.5):
        again = MlflowRun(uri, "tests", "run", run_id=first.run_id)
        again.log_parameters({"lr": lr, "steps": 10, "new": "x"})
        assert again.finish(seconds=120)
        assert again.run_id == first.run_id
        data = stored(uri, first.run_id)[0].data
        assert data.params == {"lr": "0.5", "steps": "10", "new": "x"}
        changed = {key: value for key, value in data.tags.items() if key.startswith("resumed.")}
        assert changed == {"resumed.lr": str(lr)}


@pytest.mark.parametrize("gone", ["deleted", "unknown"])
def test_a_run_that_the_store_does_not_have_is_replaced_by_a_new_one(tmp_path, caplog, gone):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = MlflowRun(uri, "tests", "run", artifacts=tmp_path / "artifacts")
    assert first.finish(seconds=120)
    run_id = "f" * 32
    if gone == "deleted":
        run_id = first.run_id
        client_of(uri).delete_run(run_id)
    given = []
    second = MlflowRun(uri, "tests", "run", run_id=run_id, on_start=given.append)
    second.log_parameters({"lr": 1})
    second.log_metrics({"train/loss": 1.0}, step=1)
    assert second.finish(seconds=120)
    assert given == [second.run_id]
    assert second.run_id not in (first.run_id, run_id)
    assert stored(uri, second.run_id)[1] == [(1, 1.0)]
    assert len([r for r in caplog.records if f"no run {run_id} any more" in r.message]) == 1


def test_a_deleted_experiment_is_said_in_one_message(tmp_path, caplog):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert MlflowRun(uri, "tests", "run", artifacts=tmp_path / "artifacts").finish(seconds=120)
    client = client_of(uri)
    client.delete_experiment(client.get_experiment_by_name("tests").experiment_id)
    run = MlflowRun(uri, "tests", "run")
    run.log_metrics({"train/loss": 1.0}, step=1)
    assert not run.finish(seconds=120)
    (record,) = (r for r in caplog.records if r.name.startswith("spikescale"))
    assert "experiment tests is deleted there" in record.message


def test_an_artifact_folder_that_cannot_be_written_costs_no_metric(tmp_path, caplog):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    note = tmp_path / "config.yaml"
    note.write_text("hello")
    run = MlflowRun(uri, "tests", "run", artifacts=tmp_path / "artifacts", retry_seconds=0.05)
    run.log_file(note)
    run.log_metrics({"train/loss": 1.0}, step=1)
    assert not run.finish(seconds=120)
    client = client_of(uri)
    assert [m.value for m in client.get_metric_history(run.run_id, "train/loss")] == [1.0]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert len([r for r in caplog.records if "does not take config.yaml" in r.message]) == 1


def test_figures_that_are_no_numbers_are_left_out_and_counted(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = MlflowRun(uri, "tests", "run", artifacts=tmp_path / "artifacts")
    run.log_metrics({"train/loss": 1.0, "norm": 2.0}, step=1)
    run.log_metrics({"train/loss": math.nan, "norm": math.inf}, step=2)
    run.log_metrics({"train/loss": 3.0, "norm": -math.inf}, step=3)
    assert run.finish(seconds=120)
    client = client_of(uri)

    def history(key):
        return sorted((m.step, m.value) for m in client.get_metric_history(run.run_id, key))

    assert history("train/loss") == [(1, 1.0), (3, 3.0)]
    assert history("norm") == [(1, 2.0)]
    assert history("nonfinite") == [(2, 2.0), (3, 1.0)]


def test_a_store_that_is_down_is_announced_once_and_gets_everything_when_it_is_back(tmp_path, caplog):
    blocked = tmp_path / "store"
    blocked.write_text("a file where the store's folder should be")
    uri = f"sqlite:///{blocked}/mlflow.db"
    with caplog.at_level(logging.WARNING, logger=delivery.__name__):
        run = MlflowRun(uri, "tests", "late", artifacts=tmp_path / "artifacts", retry_seconds=0.05)
        for step in range(1, 4):
            run.log_metrics({"train/loss": float(step)}, step=step)
        until(lambda: "does not answer" in caplog.text)
        time.sleep(0.5)  # several tries
        assert run.run_id is None
        blocked.unlink()
        blocked.mkdir()
        until(lambda: run.run_id is not None)
        assert run.finish(seconds=120)
    assert len([r for r in caplog.records if "does not answer" in r.message]) == 1
    assert len([r for r in caplog.records if "is back" in r.message]) == 1
    assert stored(uri, run.run_id)[1] == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("uri", ["sqlite:///{folder}/file/mlflow.db", "http://127.0.0.1:9"])
def test_a_store_that_stays_down_ends_the_run_early_with_a_count(tmp_path, caplog, uri):
    (tmp_path / "file").write_text("")
    run = MlflowRun(uri.format(folder=tmp_path), "tests", "lost")
    run.log_metrics({"train/loss": 1.0}, step=1)
    with caplog.at_level(logging.DEBUG):
        assert not run.finish(seconds=100_000)  # far beyond the test's own limit
    assert len([r for r in caplog.records if "does not answer" in r.message]) == 1
    assert "1 records did not arrive" in caplog.text
    assert "Retrying" not in caplog.text
