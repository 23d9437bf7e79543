"""Points from the runs of an MLflow experiment, whoever started them."""

from typing import Any

from spikescale.errors import UserError
from spikescale.scaling.points import Point
from spikescale.tracking.mlflow_store import open_client, shown

LOSS, TOKENS, FIRING = "loss/valid", "optimizer/tokens", "neurons/mean_firing_rate"


def read_mlflow(uri: str, experiment: str, curves: bool = True) -> list[Point]:
    """The validation losses of an experiment's finished runs; with `curves` also those before their end.

    N is computed from the runs' own settings. Runs that the scaling lab marked as trunks give curves only.
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
    points: list[Point] = []
    token = None
    while True:
        page = client.search_runs(
            [found.experiment_id], "attributes.status = 'FINISHED'", max_results=500, page_token=token
        )
        for run in page:
            points += _points(client, run, curves)
        token = page.token
        if not token:
            break
    if not points:
        raise UserError(f"--experiment {experiment}: no finished run of {shown(uri)} has a metric {LOSS}")
    return points


def _points(client: Any, run: Any, curves: bool) -> list[Point]:
    from spikescale.config.schema import ModelConfig
    from spikescale.scaling.ladder import Size

    losses = client.get_metric_history(run.info.run_id, LOSS)
    settings = run.data.params
    if not losses or "model.layers" not in settings:
        return []
    step_tokens = int(settings["train.batch_size"]) * int(settings["model.context_length"])
    model = ModelConfig(
        variant=settings["model.variant"],
        layers=int(settings["model.layers"]),
        width=int(settings["model.width"]),
        vocab_size=int(settings["model.vocab_size"]),
        binary_embedding=False,
    )
    size = Size.of(model)
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
                run=run.info.run_name,
                family=settings["model.variant"],
                final=metric.step == last and run.data.tags.get("scaling_kind") not in ("trunk", "plan"),
                lr=float(settings["train.lr"]),
                firing_rate=firing.get(metric.step),
            )
        )
    return points
