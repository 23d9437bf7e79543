"""A trained model as a folder that stands on its own.

    model.safetensors   float32 weights by parameter name; or several files and an index (`tensor_shards`)
                        or 8-bit integers with scales (`spikescale.quantization`)
    model.json          format version, the model's settings, checksum of the weights (of several files: by
                        name), and what is known of the training that made them (step, tokens seen, metrics)
    tokenizer/          the tokenizer, as it saves itself

A folder is written aside and renamed when it is whole. Nothing in it is executed or unpickled.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from spikescale import files
from spikescale.config import ModelConfig
from spikescale.errors import UserError
from spikescale.tensor_file import LazyTensor
from spikescale.tensor_shards import index_name, open_stored, write_sharded

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer
    from spikescale.model import SpikeGPT

FORMAT = 1
SHARDED_FORMAT = 2  # the same with weights in several files
QUANTIZED_FORMAT = 3  # one file, its matrices in 8-bit integers
WEIGHTS = "model.safetensors"
SETTINGS = "model.json"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class LoadedModel:
    """What a model folder holds. `info` has the keys that the writer chose, such as `step`."""

    model: "SpikeGPT"
    config: ModelConfig
    tokenizer: "Tokenizer"
    info: dict[str, Any]
    folder: Path


def save_model_folder(
    folder: Path,
    weights: Mapping[str, Tensor | LazyTensor],
    config: ModelConfig,
    tokenizer: "Tokenizer",
    info: Mapping[str, Any],
    max_shard_bytes: int | None = None,
) -> None:
    """Write a model folder; `weights` are converted to float32 and must bear the parameters' names.

    `config.vocab_size` must be a number. `info` must be JSON. Weights that take more than
    `max_shard_bytes` are written as several files of at most that size. Raises UserError when `folder`
    already holds something; on any failure (a full disk, a kill) `folder` is left as it was.
    """
    if config.vocab_size is None:
        raise ValueError("config.vocab_size must be a number in a model that is saved")
    tensors = {name: _as_float32(tensor) for name, tensor in sorted(weights.items())}
    with folder_aside(folder) as aside:
        written = write_sharded(aside, WEIGHTS, tensors, max_shard_bytes, {"format": "pt"})
        digests = {name: record.sha256 for name, record in written.items()}
        tokenizer.save(aside / TOKENIZER)
        files.write_json(
            aside / SETTINGS,
            {
                "format": FORMAT if len(written) == 1 else SHARDED_FORMAT,
                "config": config.model_dump(mode="json"),
                "parameters": sum(torch.Size(tensor.shape).numel() for tensor in tensors.values()),
                "weights_sha256": digests[WEIGHTS] if len(written) == 1 else digests,
                "tokenizer_sha256": tokenizer.sha256,
                "info": dict(info),
            },
        )


def load_model_folder(
    folder: Path, verify: bool = True, backend: Literal["auto", "reference", "cpu"] | None = None
) -> LoadedModel:
    """The model of a folder, on the CPU and in evaluation mode, its tokenizer, and what is known of both.

    `verify` compares the weights file with its checksum. `backend` replaces the operators' backend
    of the settings. Raises UserError for anything that is missing, damaged, or does not fit together.
    """
    from spikescale.data_pipeline.tokenizers import load_tokenizer
    from spikescale.model import SpikeGPT

    settings, config = _read_settings(folder)
    if backend is not None:
        config = config.model_copy(update={"backend": backend})
    weights_file = _weights_file(folder, settings, verify)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    assert config.vocab_size is not None
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER}: {tokenizer.vocab_size} ids, but the model knows only {config.vocab_size}"
        )
    # Built without values: drawing initial weights that are overwritten at once takes minutes when large.
    with torch.device("meta"):
        model = SpikeGPT(config)
    assert not list(model.buffers()), "to_empty would leave buffers without values"
    model.to_empty(device="cpu")
    if settings["format"] == QUANTIZED_FORMAT:
        from spikescale.quantization.folder import load_int8

        load_int8(model, weights_file, settings["quantization"])
    else:
        load_weights(model, weights_file)
    return LoadedModel(model.eval(), config, tokenizer, settings["info"], folder)


def load_weights(model: torch.nn.Module, file: Path) -> None:
    """Copy the tensors of a safetensors file, or of an index's files, into the parameters of the same names.

    Raises UserError when a name is missing or unexpected, a shape differs, or a file is damaged.
    """
    parameters = dict(model.named_parameters())
    with open_stored(file) as stored:
        _refuse_names(file, "lacks", sorted(parameters.keys() - stored.names()))
        _refuse_names(file, "has unexpected", sorted(stored.names() - parameters.keys()))
        for name, parameter in parameters.items():
            shape = stored.shape(name)
            if shape != tuple(parameter.shape):
                expected = tuple(parameter.shape)
                raise UserError(f"{file}: {name} has shape {shape}, and the settings make it {expected}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored.get(name))


def find_model_folder(path: Path) -> Path:
    """The model folder that `path` is or holds.

    `path` may be a model folder, a checkpoint `step-*`, a folder `checkpoints`, or a run's folder; of
    several checkpoints it is the one that the file `best` names, or else `latest`. It may also be what MLflow
    calls a model: runs:/ID, models:/NAME, models:/NAME/VERSION or models:/NAME@ALIAS. Raises UserError.
    """
    if str(path).startswith(("runs:/", "models:/")):
        from spikescale.tracking.registry import fetch_model

        path = fetch_model(str(path))
    for candidate in (path, path / "model"):
        if (candidate / SETTINGS).is_file():
            return candidate
    if not path.exists():
        raise UserError(f"{path}: no such folder")
    for checkpoints in (path, path / "checkpoints"):
        for pointer in (checkpoints / "best", checkpoints / "latest"):
            if pointer.is_file():
                return _pointed_at(pointer)
    raise UserError(
        f"{path}: no model found (looked for {SETTINGS}, model/{SETTINGS}, best, latest, checkpoints/best "
        "and checkpoints/latest)"
    )


def _as_float32(weight: Tensor | LazyTensor) -> Tensor | LazyTensor:
    if isinstance(weight, LazyTensor):
        return LazyTensor(torch.float32, weight.shape, lambda: weight.make().float())
    return weight.detach().float().cpu().contiguous()


def _weights_file(folder: Path, settings: dict[str, Any], verify: bool) -> Path:
    """The weights file or the index of a folder, whose checksums are compared if `verify`."""
    digests = settings["weights_sha256"]
    if isinstance(digests, str):
        digests = {WEIGHTS: digests}
    for name, expected in digests.items():
        if Path(name).name != name:
            raise UserError(f"{folder / SETTINGS}: weights_sha256 names {name!r}, which is no file name")
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        if verify and (actual := files.sha256_file(file)) != expected:
            raise UserError(f"{file}: damaged, its SHA-256 is {actual} and should be {expected}")
    return folder / (index_name(WEIGHTS) if settings["format"] == SHARDED_FORMAT else WEIGHTS)


def _read_settings(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    file = folder / SETTINGS
    settings = files.read_json(file)
    found = settings.get("format") if isinstance(settings, dict) else None
    if found not in (FORMAT, SHARDED_FORMAT, QUANTIZED_FORMAT):
        raise UserError(
            f"{file}: format {found!r}, and this version reads format {FORMAT}, {SHARDED_FORMAT} and"
            f" {QUANTIZED_FORMAT}"
        )
    wanted = {"config": dict, "weights_sha256": dict if found == SHARDED_FORMAT else str, "info": dict}
    if found == QUANTIZED_FORMAT:
        wanted["quantization"] = dict
    for key, kind in wanted.items():
        if not isinstance(settings.get(key), kind):
            raise UserError(f"{file}: {key} is missing or not a {kind.__name__}")
    try:
        config = ModelConfig.model_validate(settings["config"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("config", *(str(part) for part in first["loc"])))
        raise UserError(f"{file}: {key}: {first['msg']}") from None
    if config.vocab_size is None:
        raise UserError(f"{file}: config.vocab_size must be a number")
    return settings, config


def _pointed_at(pointer: Path) -> Path:
    name = pointer.read_text(encoding="utf-8").strip()
    folder = pointer.parent / name / "model"
    if not name or Path(name).name != name or not (folder / SETTINGS).is_file():
        raise UserError(f"{pointer}: names {name!r}, but there is no {folder / SETTINGS}")
    return folder


def _refuse_names(file: Path, complaint: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{file}: {complaint} tensor {names[0]}{more}")


def refuse_occupied(folder: Path) -> None:
    """Raise UserError if `folder` holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and is not an empty folder")


@contextlib.contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well, flush all of it and rename it to `folder`."""
    refuse_occupied(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = files.temporary_path(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            if path.is_dir():
                files.fsync_folder(path)
            else:
                files.fsync_file(path)
        aside.replace(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    files.fsync_folder(folder.parent)
