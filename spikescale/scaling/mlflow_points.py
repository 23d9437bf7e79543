"""Points from the runs of an MLflow experiment, whoever started them."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from spikescale.errors import UserError
from spikescale.scaling.points import Point
from spikescale.tracking.mlflow_store import open_client, shown

if TYPE_CHECKING:
    from spikescale.config.schema import ModelConfig

LOSS, TOKENS, FIRING = "loss/valid", "optimizer/tokens", "neurons/mean_firing_rate"


def read_mlflow(uri: str, experiment: str, curves: bool = True) -> list[Point]:
    """The validation losses of an experiment's finished runs; with `curves` also those before their end.

    N is computed from the runs' own settings. Of several runs of one name each goes by name and id. Runs that
    the scaling lab marked as trunks give curves only.
    Raises UserError for a store or experiment that is not there, or without such runs.
    """
    from mlflow.exceptions import MlflowException

    try:
        client = open_client(uri)
        found = client.get_experiment_by_name(experiment)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"--mlflow {shown(uri)}: cannot be read ({' '.join(str(error).split())[:200]})"
        ) from None
    if found is None:
        names = ", ".join(sorted(e.name for e in client.search_experiments()))
        raise UserError(f"--experiment {experiment}: not in {shown(uri)}; there are {names}")
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            [found.experiment_id], "attributes.status = 'FINISHED'", max_results=500, page_token=token
        )
        runs += page
        token = page.token
        if not token:
            break
    count = Counter(run.info.run_name for run in runs)
    points: list[Point] = []
    for run in runs:
        name, number = run.info.run_name, run.info.run_id
        points += _points(client, run, name if count[name] == 1 else f"{name} ({number})", curves)
    if not points:
        raise UserError(f"--experiment {experiment}: no finished run of {shown(uri)} has a metric {LOSS}")
    return points


def _points(client: Any, run: Any, name: str, curves: bool) -> list[Point]:
    from spikescale.scaling.ladder import Size

    losses = client.get_metric_history(run.info.run_id, LOSS)
    settings = run.data.params
    if not losses or "model.layers" not in settings:
        return []
    step_tokens = int(settings["train.batch_size"]) * int(settings["model.context_length"])
    size = Size.of(_model(settings, name))
    firing = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, FIRING)}
    last = max(metric.step for metric in losses)
    points = []
    for metric in sorted(losses, key=lambda metric: metric.step):
        if metric.step == 0 or not (curves or metric.step == last):
            continue
        points.append(
            Point(
                parameters=float(size.total),
                parameters_non_embedding=float(size.non_embedding),
                tokens=float(metric.step * step_tokens),
                loss=metric.value,
                flop=float(size.flop_per_token * metric.step * step_tokens),
                run=name,
                family=settings["model.variant"],
                final=metric.step == last and run.data.tags.get("scaling_kind") not in ("trunk", "plan"),
                lr=float(settings["train.lr"]),
                firing_rate=firing.get(metric.step),
            )
        )
    return points


def _model(settings: dict[str, str], name: str) -> "ModelConfig":
    """The model that a run's settings describe; MLflow keeps them as text, None as the word."""
    from pydantic import ValidationError

    from spikescale.config.schema import ModelConfig

    nested: dict[str, Any] = {}
    for key, value in settings.items():
        group, *path = key.split(".")
        if group == "model" and value != "None":
            place = nested
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = value
    if nested["variant"] == "rwkv":
        nested.setdefault("binary_embedding", "false")
    try:
        return ModelConfig.model_validate_strings(nested)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("model", *first["loc"])))
        raise UserError(f"run {name}: its {key} is no setting of a model ({first['msg']})") from None
