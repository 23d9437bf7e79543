"""Everything a run writes down for people, on rank 0: its settings, metrics, samples, curves, MLflow run."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spikescale.config import RunConfig
from spikescale.errors import UserError
from spikescale.faults.events import append_event
from spikescale.files import read_json, write_json, write_text
from spikescale.tracking.curves import plot_curves
from spikescale.tracking.environment import describe_environment
from spikescale.tracking.metrics_file import MetricsFile, read_metrics
from spikescale.tracking.mlflow_run import MlflowRun
from spikescale.tracking.mlflow_store import default_store, is_server, shown
from spikescale.training.bootstrap import Process
from spikescale.training.checkpoint_files import MODEL
from spikescale.training.dataset import Dataset

log = logging.getLogger(__name__)

MLFLOW_FILE = "mlflow_run.json"  # in the run's folder: the MLflow run to continue, and its store
RESULT_FILE = "result.json"  # in the run's folder, once it is finished
# MLflow's pages group charts by the part before the slash, in alphabetical order: the loss comes first.
MLFLOW_NAMES = {
    "loss": "loss/train",
    "valid_loss": "loss/valid",
    "valid_perplexity": "loss/valid_perplexity",
    "valid_bits_per_byte": "loss/valid_bits_per_byte",
    "valid_bits_per_character": "loss/valid_bits_per_character",
    "firing_rate": "neurons/mean_firing_rate",
    "lr": "optimizer/lr",
    "gradient_norm": "optimizer/gradient_norm",
    "tokens": "optimizer/tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "flops_per_second": "speed/flops_per_second",
    "peak_share": "speed/share_of_peak",
    "data_wait_share": "speed/data_wait_share",
    "skipped_steps": "faults/skipped_steps",
    "rollbacks": "faults/rollbacks",
    "spikes": "faults/spikes",
}
# Figures that each layer or source has, and their group of charts.
MLFLOW_GROUPS = {
    "firing_rates": "neurons",
    "dead_neurons": "dead",
    "saturated_neurons": "saturated",
    "source_losses": "loss_of_source",
    "valid_source_losses": "loss_of_source_valid",
}


class RunRecords:
    """Writer of a run's files. On other ranks than 0 every method does nothing."""

    def __init__(
        self, config: RunConfig, process: Process, data: Dataset, restored: dict[str, Any] | None
    ) -> None:
        self.config, self.is_main = config, process.is_main
        self._mlflow: MlflowRun | None = None
        if not self.is_main:
            return
        self.folder = config.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = config.model_dump(mode="json")
        write_text(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings)))
        step = restored["step"] if restored else 0
        rollbacks = restored.get("faults", {}).get("rollbacks", 0) if restored else 0
        self._metrics = MetricsFile(self.folder / "metrics.jsonl", step, rollbacks)
        if config.mlflow.enabled:
            self._start_mlflow(settings, process, data, restored)

    @property
    def store(self) -> str:
        """Address of the MLflow store."""
        return self.config.mlflow.uri or default_store(self.config.output)

    def _start_mlflow(
        self, settings: dict[str, Any], process: Process, data: Dataset, restored: dict[str, Any] | None
    ) -> None:
        local = self.config.mlflow.uri is None
        if restored is None:
            (self.folder / MLFLOW_FILE).unlink(missing_ok=True)  # of an earlier run that left no checkpoint
        self._mlflow = MlflowRun(
            self.store,
            self.config.mlflow.experiment,
            self.config.name,
            run_id=_earlier_run(self.folder / MLFLOW_FILE, self.store),
            artifacts=self.config.output / "mlartifacts" if local else None,
            on_start=self._remember,
        )
        tags = {
            "data.path": data.folders,
            "data.manifest_sha256": data.sha256,
            "data.tokenizer": data.tokenizer.kind,
            "ranks": str(process.world_size),
            **{f"environment.{key}": value for key, value in describe_environment().items()},
            **self.config.mlflow.tags,
        }
        if self.config.mlflow.parent_run is not None:
            tags["mlflow.parentRunId"] = self.config.mlflow.parent_run
        self._mlflow.set_tags(tags)
        self._mlflow.log_parameters(_flat(settings))
        self._mlflow.log_file(self.folder / "config.yaml")

    def _remember(self, run_id: str) -> None:
        # At once and not with a checkpoint: a checkpoint may be saved before a slow store has answered.
        write_json(self.folder / MLFLOW_FILE, {"run_id": run_id, "uri": self.store})

    def write(self, record: dict[str, Any]) -> None:
        """Record the figures of a step."""
        if not self.is_main:
            return
        self._metrics.write(record)
        if self._mlflow:
            self._mlflow.log_metrics(_metric_names(record), record["step"])

    def event(self, event: str, step: int, **facts: Any) -> None:
        """Append to events.jsonl what happened at a step besides training."""
        if self.is_main:
            append_event(self.folder, event, step, **facts)

    def roll_back(self, step: int, number: int, facts: dict[str, Any]) -> None:
        """Drop the records after `step` and record roll-back number `number` in their place."""
        if self.is_main:
            self._metrics.rewind(step, number - 1)
            self.write({"step": step, "rollback": number, **facts})

    def write_samples(self, step: int, texts: list[str]) -> None:
        """Append generated texts to samples.txt."""
        if self.is_main:
            with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
                for number, text in enumerate(texts, 1):
                    print(f"=== step {step}, sample {number}\n{text}\n", file=file)

    def write_summary(self, figures: dict[str, float]) -> None:
        """Record the final figures as metrics named `summary/...`."""
        if self.is_main and self._mlflow:
            step = self.config.train.steps
            self._mlflow.log_metrics({f"summary/{key}": value for key, value in figures.items()}, step)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json: what the finished run came to, replacing that of an earlier end."""
        if self.is_main:
            write_json(self.folder / RESULT_FILE, result)

    def register_model(self, checkpoint: Path, step: int, metrics: dict[str, float]) -> None:
        """Hand a checkpoint's model to MLflow's registry, if the settings say so."""
        settings = self.config.mlflow
        if not (self.is_main and self._mlflow and settings.register_model):
            return
        model = self.config.model
        tags = {"step": str(step), "variant": model.variant, "layers": str(model.layers)}
        tags |= {"width": str(model.width), **{key: f"{value:.6g}" for key, value in metrics.items()}}
        self._mlflow.register_model(checkpoint / MODEL, settings.model_name or self.config.name, tags)

    def close(self, status: str) -> None:
        """Draw the curves, hand the files to MLflow and end its run."""
        if not self.is_main:
            return
        # The run is over and its checkpoints are safe: nothing here may replace the error that ended it.
        self._attempt("metrics.jsonl", self._metrics.close)
        self._attempt("curves.png", self._draw)
        if self._mlflow:
            for name in ("metrics.jsonl", "events.jsonl", "samples.txt", "log.txt", "curves.png"):
                if (self.folder / name).exists():
                    self._mlflow.log_file(self.folder / name)
            self._mlflow.finish(status)

    def _draw(self) -> None:
        records = read_metrics(self.folder / "metrics.jsonl")
        plot_curves(records, self.folder / "curves.png", self.config.name)

    def _attempt(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            log.warning("%s: not finished: %s", self.folder / name, error)


def _earlier_run(path: Path, store: str) -> str | None:
    # The MLflow run to continue: the one this folder began in the same store.
    if not path.exists():
        return None
    try:
        earlier = read_json(path)
    except UserError as error:
        log.warning("%s; a new MLflow run starts", error)
        return None
    if not isinstance(earlier, dict) or earlier.get("uri") != store:
        return None
    run_id = earlier.get("run_id")
    return run_id if isinstance(run_id, str) else None


def _metric_names(record: dict[str, Any]) -> dict[str, float]:
    named = {MLFLOW_NAMES[key]: value for key, value in record.items() if key in MLFLOW_NAMES}
    for key, group in MLFLOW_GROUPS.items():
        named |= {f"{group}/{layer}": share for layer, share in record.get(key, {}).items()}
    return {name: value for name, value in named.items() if value is not None}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def run_address(records: RunRecords) -> list[tuple[str, str]]:
    """Where to look, as (what, where) rows for the final table."""
    rows = [("run folder", str(records.folder)), ("curves", str(records.folder / "curves.png"))]
    if records.config.mlflow.enabled:
        store = records.store
        if is_server(store):
            rows.append(("MLflow", shown(store)))
        else:
            rows.append(("MLflow", f"mlflow ui --host 127.0.0.1 --backend-store-uri {_short(shown(store))}"))
    return rows


def _short(store: str) -> str:
    # A local store is shown relative to the working directory, as the user would type it.
    prefix, here = "sqlite:///", str(Path.cwd())
    path = store.removeprefix(prefix)
    if store.startswith(prefix) and path.startswith(here + "/"):
        return prefix + path.removeprefix(here + "/")
    return store
