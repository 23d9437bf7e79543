"""From the options of `spikescale plan` to a workload and a device."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from spikescale.config import load_config, load_model_preset
from spikescale.config.schema import ModelConfig, ParallelConfig, TrainConfig, ZeroConfig
from spikescale.errors import UserError
from spikescale.parallel.layout import Layout
from spikescale.planning.devices import GIB, GIGA, HOST_BASELINE, TERA, Device, find_device
from spikescale.planning.memory import Workload

MICRO_BATCH = 8
BYTES, NEOX = 256, 50277  # symbols of the two tokenizers that the presets are meant for
USUAL_VOCABULARY = {"tiny": BYTES, "46m": BYTES}


@dataclass(frozen=True)
class Request:
    """What is to be planned."""

    workload: Workload
    device: Device
    memory: int  # bytes of one device; on CPUs what a rank may take
    host_memory: int | None  # bytes of the host for one rank; None: as much as is needed
    tokens: float | None
    price: float | None  # of a device and hour


def read_request(options: Mapping[str, Any]) -> Request:
    """The request that a command line makes. Raises UserError for what does not fit together."""
    device = _device(options)
    model, train, zero, parallel = _settings(options)
    model = _model(model, options)
    parallel = _parallel(parallel, options)
    train = _train(train, parallel, options)
    workload = Workload(
        model,
        train,
        zero,
        parallel,
        ranks=options["gpus"],
        on_cpu=device.on_cpu,
        baseline=device.baseline,
        host_baseline=0 if device.on_cpu else HOST_BASELINE,
    )
    host = options["host_mem"]
    return Request(
        workload,
        device,
        device.memory,
        None if host is None else round(host * GIB),
        options["tokens"] or (_tokens_of_run(train, model) if options["config"] else None),
        options["price"],
    )


def _tokens_of_run(train: TrainConfig, model: ModelConfig) -> int:
    return train.steps * train.batch_size * model.context_length


def _device(options: Mapping[str, Any]) -> Device:
    device = find_device(options["device"])
    changes: dict[str, Any] = {}
    if options["gpu_mem"]:
        changes["memory"] = round(options["gpu_mem"] * GIB)
    if options["peak_tflops"]:
        changes["matrix_peaks"] = dict.fromkeys(device.matrix_peaks, options["peak_tflops"] * TERA)
    if options["efficiency"]:
        changes["efficiency"] = options["efficiency"]
    if options["bandwidth"]:
        changes["bandwidth"] = options["bandwidth"] * GIGA
    if options["link"]:
        changes["link"] = options["link"] * GIGA
    if changes:
        changes["source"] = f"{device.source}; {', '.join(sorted(changes))} as given"
    return replace(device, **changes)


def _settings(options: Mapping[str, Any]) -> tuple[ModelConfig, TrainConfig, ZeroConfig, ParallelConfig]:
    if options["config"] is None:
        model = load_model_preset(options["model"])
        return model, TrainConfig(precision="bfloat16"), ZeroConfig(), ParallelConfig()
    config = load_config(options["config"])
    return config.model, config.train, config.zero, config.parallel


def _model(model: ModelConfig, options: Mapping[str, Any]) -> ModelConfig:
    symbols = options["vocab"] or model.vocab_size or USUAL_VOCABULARY.get(model.preset or "", NEOX)
    changes = {"vocab_size": symbols, "context_length": options["context"] or model.context_length}
    return _changed(model, changes)


def _parallel(parallel: ParallelConfig, options: Mapping[str, Any]) -> ParallelConfig:
    changes = {"tensor": options["tensor"], "context": options["context_ranks"]}
    return _changed(parallel, {key: value for key, value in changes.items() if value is not None})


def _train(train: TrainConfig, parallel: ParallelConfig, options: Mapping[str, Any]) -> TrainConfig:
    parts = Layout.of(parallel, 0, options["gpus"]).data
    changes: dict[str, Any] = {}
    if options["config"] is None:
        micro = options["micro_batch"] or MICRO_BATCH
        changes |= {"micro_batch_size": micro, "batch_size": options["batch"] or micro * parts}
    else:
        changes |= {"batch_size": options["batch"] or train.batch_size}
        changes |= {"micro_batch_size": options["micro_batch"] or train.micro_batch_size}
    if options["precision"]:
        changes["precision"] = "float32" if options["precision"] == "float32" else "bfloat16"
    elif train.precision == "auto":
        changes["precision"] = "bfloat16"
    if options["checkpointing"] is not None:
        changes["activation_checkpointing"] = options["checkpointing"]
    return _changed(train, changes)


def _changed(settings: Any, changes: Mapping[str, Any]) -> Any:
    # Through the checks of the schema, which a plain copy leaves out.
    try:
        return type(settings).model_validate({**settings.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where + ': ' if where else ''}{first['msg']}") from None
