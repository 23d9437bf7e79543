"""The MLflow run that stands for a plan; its runs are that run's children."""

import logging
from pathlib import Path

from spikescale.scaling.plan_file import Plan
from spikescale.tracking.delivery import one_line
from spikescale.tracking.mlflow_store import default_store, open_client, probe, shown

log = logging.getLogger(__name__)

PARENT_TAG = "scaling_plan"


def store_of(plan: Plan) -> str:
    """Address of the MLflow store that the plan's runs are tracked in."""
    return str(plan.base.get("mlflow", {}).get("uri") or default_store(plan.output))


def parent_run(plan: Plan, path: Path, known: str | None) -> str | None:
    """Id of the plan's own run, made if need be; None when the store does not answer, which is said."""
    from mlflow.exceptions import MlflowException

    uri = store_of(plan)
    experiment = str(plan.base.get("mlflow", {}).get("experiment", "spikescale"))
    try:
        probe(uri)
        client = open_client(uri)
        if known is not None:
            try:
                return str(client.get_run(known).info.run_id)
            except MlflowException:
                log.warning("MLflow at %s has no run %s any more; a new one starts", shown(uri), known)
        found = client.get_experiment_by_name(experiment)
        place = (
            None
            if plan.base.get("mlflow", {}).get("uri")
            else (plan.output / "mlartifacts").resolve().as_uri()
        )
        number = found.experiment_id if found else client.create_experiment(experiment, place)
        run = client.create_run(
            number, run_name=plan.name, tags={PARENT_TAG: plan.name, "scaling_kind": "plan"}
        )
        client.log_artifact(run.info.run_id, str(path))
        return str(run.info.run_id)
    except Exception as error:  # whatever a store or the network throws must not keep the runs from starting
        log.warning("MLflow at %s: no run for the plan (%s)", shown(uri), one_line(error))
        return None


def end_parent_run(plan: Plan, run: str, finished: bool) -> None:
    """Mark the plan's own run as ended. A store that does not answer is left alone, which is said."""
    try:
        open_client(store_of(plan)).set_terminated(run, "FINISHED" if finished else "KILLED")
    except Exception as error:  # as above
        log.warning(
            "MLflow at %s: the plan's run could not be ended (%s)", shown(store_of(plan)), one_line(error)
        )
