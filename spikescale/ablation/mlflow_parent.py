"""An ablation in MLflow: one parent run, under which its pretraining runs stand."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikescale.ablation.report import JSON_FILE, PLOT_FILE
from spikescale.ablation.study import AblationRun
from spikescale.files import read_json, write_json
from spikescale.tracking.mlflow_store import default_store, open_client
from spikescale.training.records import MLFLOW_FILE

log = logging.getLogger(__name__)


def record(runs: Sequence[AblationRun], summary: dict[str, Any], folder: Path) -> str | None:
    """Make or continue the parent run, hang the children under it, and give it figures, table and plot.

    Returns its id; None where the runs were not tracked. A store that does not answer costs the record only,
    and is warned of.
    """
    mlflow = runs[0].config.mlflow
    if not mlflow.enabled:
        return None
    store = mlflow.uri or default_store(runs[0].config.output)
    try:
        return _record(runs, summary, folder, store)
    except Exception as error:  # MLflow's, SQLAlchemy's and the network's; the files are written already
        log.warning("the ablation is not recorded in MLflow: %s", " ".join(str(error).split())[:200])
        return None


def _record(runs: Sequence[AblationRun], summary: dict[str, Any], folder: Path, store: str) -> str | None:
    children = [
        read_json(run.folder / MLFLOW_FILE)["run_id"]
        for run in runs
        if run.result() is not None and (run.folder / MLFLOW_FILE).exists()
    ]
    if not children:
        return None
    client = open_client(store)
    parent = _parent(client, folder, store, client.get_run(children[0]).info.experiment_id)
    for child in children:
        client.set_tag(child, "mlflow.parentRunId", parent)
    for row in summary["variants"]:
        value = row["bits_per_byte"]
        client.log_metric(parent, f"{summary['split']}_bits_per_byte/{row['variant']}", value["mean"])
        if value["low"] is not None:
            half = (value["high"] - value["low"]) / 2
            client.log_metric(parent, f"{summary['split']}_half_interval/{row['variant']}", half)
    for name in (JSON_FILE, PLOT_FILE):
        client.log_artifact(parent, str(folder / name))
    client.set_terminated(parent, "FINISHED" if summary["finished"] == summary["planned"] else "KILLED")
    return parent


def _parent(client: Any, folder: Path, store: str, experiment: str) -> str:
    from mlflow.exceptions import MlflowException

    file = folder / MLFLOW_FILE
    if file.exists():
        earlier = read_json(file)
        if earlier.get("uri") == store:
            try:
                if client.get_run(earlier["run_id"]).info.lifecycle_stage == "active":
                    return str(earlier["run_id"])
            except MlflowException:
                pass  # it was deleted: a new one is made
    made = str(client.create_run(experiment, run_name=folder.name).info.run_id)
    write_json(file, {"run_id": made, "uri": store})
    return made
