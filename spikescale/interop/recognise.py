"""Which program wrote a file of weights, and what model its shapes describe."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from spikescale.config import ModelConfig
from spikescale.config.load import preset_names, read_preset
from spikescale.config.schema import Variant
from spikescale.errors import UserError
from spikescale.interop.foreign import ForeignTensors, read_json_beside
from spikescale.interop.naming import (
    BLINK,
    HF_RWKV,
    HF_SPIKEGPT,
    NAMINGS,
    SPIKESCALE,
    Naming,
    parameter_shapes,
)

SETTINGS_FILE = "spikescale.json"  # beside exported .pth files: the settings, which their shapes do not tell
_EPSILON = 1e-5

# What an unexpected or absent name means, where that is known.
_HINTS = (
    (("head_q.", "head_k.", "copy_mask"), "the query-key head of RWKV_HEAD_QK_DIM is not supported"),
    ((".ffnPre.",), "RWKV-ffnPre models have no TimeMix in block 0, which is not supported"),
    ((".ln_x.", ".gate.", "time_maa", "time_faaaa", ".x_r", ".r_k"), "RWKV-5 and later are other models"),
    ((".weight_mx", ".weight_rx"), "it was quantised for the package rwkv: take the original"),
)
_CONVERTED = {"_strategy", "_version", "_rescale_layer"}


@dataclass(frozen=True)
class Recognised:
    """A file's naming, the settings of its model, and from where in it each parameter comes.

    Attributes:
        sources: their name of each of our parameters.
        decided: what was assumed and is not in the file, a line each, to be shown to the user.
    """

    naming: Naming
    config: ModelConfig
    sources: dict[str, str]
    decided: list[str]


def recognise(
    tensors: ForeignTensors,
    variant: Variant | None = None,
    embedding: Literal["binary", "float"] | None = None,
    context_length: int | None = None,
) -> Recognised:
    """What `tensors` are. `variant`, `embedding` and `context_length` stand for what shapes do not tell.

    Raises UserError naming the tensor that is missing, unexpected or of another shape than it should be, or
    what else has to be said.
    """
    file = tensors.label
    names = set(tensors.shapes)
    if converted := sorted(_CONVERTED & set(tensors.others)):
        raise UserError(
            f"{file}: holds {converted[0]}: it was converted for the package rwkv, with transposed and"
            " rescaled matrices; import the file that it was made from"
        )
    naming = next((naming for naming in NAMINGS if naming.is_followed(names)), None)
    if naming is None:
        example = min(names)
        raise UserError(
            f"{file}: tensors are named like {example}; known are {', '.join(n.title for n in NAMINGS)}"
        )
    described = _described(file, naming)
    decided: list[str] = []
    shape = _shape(tensors, naming)
    config = _settings(file, naming, shape, described, variant, embedding, context_length, decided)
    sources = {ours: naming.theirs(ours) for ours in parameter_shapes(config)}
    tied = bool(described.get("tie_word_embeddings")) and naming in (HF_RWKV, HF_SPIKEGPT)
    if tied and sources["head.weight"] not in names:
        sources["head.weight"] = sources["embedding.weight"]
        decided.append("head: tied to the embeddings, copied from them")
    _check(tensors, naming, config, sources)
    return Recognised(naming, config, sources, decided)


def _described(file: Path, naming: Naming) -> dict[str, Any]:
    name = {SPIKESCALE.title: "model.json", BLINK.title: SETTINGS_FILE}.get(naming.title, "config.json")
    described = read_json_beside(file, name) or {}
    if naming is HF_RWKV and (epsilon := described.get("layer_norm_epsilon", _EPSILON)) != _EPSILON:
        raise UserError(
            f"{file.parent / name}: layer_norm_epsilon is {epsilon}; spikescale has {_EPSILON} only"
        )
    return described


def _shape(tensors: ForeignTensors, naming: Naming) -> dict[str, int]:
    """Layers, width and vocabulary size, by the shape of the embeddings and the blocks' numbers."""
    embedding = naming.top["embedding.weight"]
    if embedding not in tensors.shapes:
        raise UserError(f"{tensors.label}: lacks tensor {embedding}{_hint({*tensors.shapes})}")
    shape = tensors.shapes[embedding]
    if len(shape) != 2 or min(shape) < 1:
        raise UserError(f"{tensors.label}: {embedding} has shape {shape}; it should be (vocabulary, width)")
    layers = naming.layers(set(tensors.shapes))
    if not layers:
        raise UserError(f"{tensors.label}: has no blocks, named {naming.blocks.format('N')}...")
    return {"layers": layers, "vocab_size": shape[0], "width": shape[1]}


def _settings(
    file: Path,
    naming: Naming,
    shape: dict[str, int],
    described: dict[str, Any],
    variant: Variant | None,
    embedding: str | None,
    context_length: int | None,
    decided: list[str],
) -> ModelConfig:
    known = described.get("config", {}) if naming in (BLINK, SPIKESCALE) else described.get("spikescale", {})
    settings: dict[str, Any] = {**known, **shape}
    if naming is HF_RWKV:
        settings["variant"] = "rwkv"
        settings.setdefault("context_length", described.get("context_length", 1024))
    if variant is not None:
        if naming is HF_RWKV and variant != "rwkv":
            raise UserError(f"--variant {variant}: {file} is of {naming.title}, whose variant is rwkv")
        settings["variant"] = variant
    if "variant" not in settings:
        raise UserError(
            f"{file}: its names and shapes are those of several variants: say --variant spikegpt for a"
            " released SpikeGPT, --variant rwkv for an RWKV-4"
        )
    if embedding is not None:
        settings["binary_embedding"] = embedding == "binary"
    if settings["variant"] == "rwkv":
        settings.setdefault("binary_embedding", False)
    if "binary_embedding" not in settings:
        small = read_preset("model", "46m")
        binary = (shape["layers"], shape["width"]) == (small.layers, small.width)
        settings["binary_embedding"] = binary
        decided.append(
            f"embedding: {'binary' if binary else 'float'}, as the paper's models of "
            f"{shape['layers']} layers and width {shape['width']} are; --embedding decides otherwise"
        )
    if context_length is not None:
        settings["context_length"] = context_length
    if "context_length" not in settings:
        settings["context_length"] = 1024
        decided.append("context length: 1024 tokens, as in the paper; --context-length decides otherwise")
    settings.setdefault("preset", _preset(shape))
    try:
        return ModelConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file}: {key + ': ' if key else ''}{first['msg']}") from None


def _preset(shape: dict[str, int]) -> str | None:
    for name in preset_names("model"):
        preset = read_preset("model", name)
        if (preset.layers, preset.width) == (shape["layers"], shape["width"]):
            return name
    return None


def _check(tensors: ForeignTensors, naming: Naming, config: ModelConfig, sources: dict[str, str]) -> None:
    """Every parameter is there in its shape, and nothing else is."""
    expected = parameter_shapes(config)
    wanted = set(sources.values())
    names = set(tensors.shapes)
    if missing := sorted(wanted - names):
        raise UserError(f"{tensors.label}: lacks tensor {missing[0]}{_more(missing)}{_hint(names - wanted)}")
    if unexpected := sorted(names - wanted):
        hint = _hint(set(unexpected))
        raise UserError(f"{tensors.label}: has unexpected tensor {unexpected[0]}{_more(unexpected)}{hint}")
    for ours, theirs in sources.items():
        shape = tensors.shapes[theirs]
        # Mixtures are kept as (1, 1, C) by some versions and as (C,) by others.
        same = math.prod(shape) == math.prod(expected[ours]) and (
            [n for n in shape if n != 1] == [n for n in expected[ours] if n != 1]
        )
        if not same or (len(expected[ours]) == 2 and shape != expected[ours]):
            should = naming.their_shape(ours, expected[ours])
            raise UserError(
                f"{tensors.label}: {theirs} has shape {shape}; a model of {config.layers} layers, width"
                f" {config.width} and {config.vocab_size} symbols has {should}"
            )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _hint(names: set[str]) -> str:
    for parts, meaning in _HINTS:
        if any(part in name for name in names for part in parts):
            return f" ({meaning})"
    return ""
