"""Model folders with eight-bit weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from spikescale import files
from spikescale.errors import UserError
from spikescale.model.spikegpt import SpikeGPT
from spikescale.model.store import (
    QUANTIZED_FORMAT,
    SETTINGS,
    TOKENIZER,
    WEIGHTS,
    find_model_folder,
    folder_aside,
    load_model_folder,
)
from spikescale.quantization.int8 import SCALE, apply_int8, is_quantized, quantized_tensors
from spikescale.quantization.settings import Quantization
from spikescale.tensor_file import write_tensors
from spikescale.tensor_shards import open_stored


def quantize_model_folder(source: Path, destination: Path, quantization: Quantization) -> dict[str, Any]:
    """Write the model that `source` is or holds to `destination` with eight-bit weights.

    Returns the bytes of both weights files. `evaluate`, `generate` and all else read the folder like any
    other. Raises UserError when the model is damaged or quantised already, or `destination` holds something.
    """
    folder = find_model_folder(source)
    loaded = load_model_folder(folder)
    if is_quantized(loaded.model):
        raise UserError(f"{folder}: has 8-bit weights already")
    settings = files.read_json(folder / SETTINGS)
    with folder_aside(destination) as aside:
        written = write_tensors(aside / WEIGHTS, quantized_tensors(loaded.model), {"format": "pt"})
        shutil.copytree(folder / TOKENIZER, aside / TOKENIZER)
        settings |= {
            "format": QUANTIZED_FORMAT,
            "quantization": quantization.model_dump(),
            "weights_sha256": written.sha256,
        }
        files.write_json(aside / SETTINGS, settings)
    before = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"float32_bytes": before, "int8_bytes": written.bytes, "parameters": settings["parameters"]}


def load_int8(model: SpikeGPT, file: Path, described: dict[str, Any]) -> None:
    """Give a model the weights of a quantised folder's file; `described`: `quantization` of its settings.

    Raises UserError when a tensor is missing, unexpected, or of another shape or dtype than it must be.
    """
    try:
        quantization = Quantization.model_validate(described)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("quantization", *(str(part) for part in first["loc"])))
        raise UserError(f"{file.parent / SETTINGS}: {key}: {first['msg']}") from None
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        expected[name] = (shape, torch.int8 if len(shape) == 2 else torch.float32)
        if len(shape) == 2:
            expected[name + SCALE] = (shape[:1], torch.float32)
    with open_stored(file) as stored:
        for complaint, names in (
            ("lacks", expected.keys() - stored.names()),
            ("has unexpected", stored.names() - expected.keys()),
        ):
            if names:
                raise UserError(f"{file}: {complaint} tensor {sorted(names)[0]}")
        tensors = {name: stored.get(name) for name in expected}
    for name, (shape, dtype) in expected.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise UserError(
                f"{file}: {name} is {found.dtype} {tuple(found.shape)}, and the settings make it {dtype}"
                f" {shape}"
            )
    apply_int8(model, tensors, quantization)
