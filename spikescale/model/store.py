"""A trained model as a folder that stands on its own.

    model.safetensors   float32 weights by parameter name
    model.json          format version, the model's settings, checksum of the weights, and what is known of
                        the training that made them (step, tokens seen, metrics)
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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spikescale import files
from spikescale.config import ModelConfig
from spikescale.errors import UserError
from spikescale.tensor_file import write_tensors

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer
    from spikescale.model import SpikeGPT

FORMAT = 1
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
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: "Tokenizer",
    info: Mapping[str, Any],
) -> None:
    """Write a model folder; `weights` are converted to float32 and must bear the parameters' names.

    `config.vocab_size` must be a number. `info` must be JSON. Raises UserError when `folder` already
    holds something; on any failure (a full disk, a kill) `folder` is left as it was.
    """
    if config.vocab_size is None:
        raise ValueError("config.vocab_size must be a number in a model that is saved")
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in sorted(weights.items())}
    with _folder_aside(folder) as aside:
        written = write_tensors(aside / WEIGHTS, tensors, {"format": "pt"})
        tokenizer.save(aside / TOKENIZER)
        files.write_json(
            aside / SETTINGS,
            {
                "format": FORMAT,
                "config": config.model_dump(mode="json"),
                "parameters": sum(tensor.numel() for tensor in tensors.values()),
                "weights_sha256": written.sha256,
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
    weights_file = folder / WEIGHTS
    if not weights_file.is_file():
        raise UserError(f"{weights_file}: no such file")
    if verify and (actual := files.sha256_file(weights_file)) != settings["weights_sha256"]:
        expected = settings["weights_sha256"]
        raise UserError(f"{weights_file}: damaged, its SHA-256 is {actual} and should be {expected}")
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
    load_weights(model.to_empty(device="cpu"), weights_file)
    return LoadedModel(model.eval(), config, tokenizer, settings["info"], folder)


def load_weights(model: torch.nn.Module, file: Path) -> None:
    """Copy the tensors of a safetensors file into the parameters of the same names and shapes.

    Raises UserError when a name is missing or unexpected, a shape differs, or the file is damaged.
    """
    parameters = dict(model.named_parameters())
    try:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            _refuse_names(file, "lacks", sorted(parameters.keys() - names))
            _refuse_names(file, "has unexpected", sorted(names - parameters.keys()))
            for name, parameter in parameters.items():
                shape = tuple(stored.get_slice(name).get_shape())
                if shape != tuple(parameter.shape):
                    expected = tuple(parameter.shape)
                    raise UserError(f"{file}: {name} has shape {shape}, and the settings make it {expected}")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(stored.get_tensor(name))
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from None


def find_model_folder(path: Path) -> Path:
    """The model folder that `path` is or holds.

    `path` may be a model folder, a checkpoint `step-*`, a folder `checkpoints`, or a run's folder; of
    several checkpoints it is the one that the file `best` names, or else `latest`. Raises UserError.
    """
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


def export_model_folder(source: Path, destination: Path) -> LoadedModel:
    """Copy the model that `source` is or holds to `destination`, after loading and verifying it.

    Raises UserError when the model is damaged or `destination` already holds something.
    """
    folder = find_model_folder(source)
    _refuse_occupied(destination)
    loaded = load_model_folder(folder)
    with _folder_aside(destination) as aside:
        for name in (WEIGHTS, SETTINGS):
            shutil.copyfile(folder / name, aside / name)
        shutil.copytree(folder / TOKENIZER, aside / TOKENIZER)
        expected = files.read_json(aside / SETTINGS)["weights_sha256"]
        if files.sha256_file(aside / WEIGHTS) != expected:
            raise UserError(f"{destination}: the copy of {WEIGHTS} differs from the original")
    return loaded


def _read_settings(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    file = folder / SETTINGS
    settings = files.read_json(file)
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else None
        raise UserError(f"{file}: format {found!r}, and this version reads format {FORMAT}")
    for key, kind in (("config", dict), ("weights_sha256", str), ("info", dict)):
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


def _refuse_occupied(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and is not an empty folder")


@contextlib.contextmanager
def _folder_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well, flush all of it and rename it to `folder`."""
    _refuse_occupied(folder)
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
