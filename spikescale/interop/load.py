"""Weights of other programs into a model folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from spikescale import __version__
from spikescale.config import ModelConfig
from spikescale.config.schema import Variant
from spikescale.errors import UserError
from spikescale.interop.foreign import ForeignTensors, find_weights, open_foreign
from spikescale.interop.naming import parameter_shapes
from spikescale.interop.recognise import recognise
from spikescale.model.store import refuse_occupied, save_model_folder
from spikescale.tensor_file import LazyTensor

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer

# Whose output goes onto the residual stream: what rescaling by layers has divided.
_ONTO_STREAM = ("time_mix.output.weight", "channel_mix.value.weight")


@dataclass(frozen=True)
class Imported:
    """What was imported: the file, what it was taken for, and what was assumed about it."""

    file: Path
    title: str
    config: ModelConfig
    parameters: int
    decided: list[str]


def import_weights(
    source: Path,
    destination: Path,
    tokenizer: "Callable[[Path, int], Tokenizer]",
    *,
    variant: Variant | None = None,
    embedding: Literal["binary", "float"] | None = None,
    context_length: int | None = None,
    rescaled_every: int = 0,
    max_shard_bytes: int | None = None,
) -> Imported:
    """Write the weights that `source` is or holds as a model folder.

    Args:
        source: a file, an index, or a folder with one.
        destination: the folder to make.
        tokenizer: called with the file and the vocabulary's size; the tokenizer to go with the weights.
        variant, embedding, context_length: see `recognise`.
        rescaled_every: undo a rescaling: block l's outputs onto the residual stream are multiplied by
            2^(l // rescaled_every). RWKV's programs for half precision divide by that (exact: only exponents
            change) and halve the stream to match. 0: the weights are as trained.
        max_shard_bytes: of one weights file.

    Tensors are read, converted to float32 and written one at a time. Raises UserError for anything that does
    not fit, a number that is none among it.
    """
    refuse_occupied(destination)
    file = find_weights(source)
    with open_foreign(file) as tensors:
        found = recognise(tensors, variant, embedding, context_length)
        config = found.config
        if rescaled_every and config.variant != "rwkv":
            raise UserError(
                f"--rescaled-every {rescaled_every}: only rwkv can be rescaled; {config.variant} adds spikes,"
                " which are 0 or 1"
            )
        shapes = parameter_shapes(config)
        weights: dict[str, Tensor | LazyTensor] = {}
        for ours, theirs in found.sources.items():
            read = _reader(tensors, theirs, shapes[ours], _scale(ours, rescaled_every))
            weights[ours] = LazyTensor(torch.float32, shapes[ours], read)
        assert config.vocab_size is not None
        info: dict[str, Any] = {
            "imported_from": file.name,
            "imported_as": found.naming.title,
            "imported_by": f"spikescale {__version__}",
        }
        if rescaled_every:
            info["rescaled_every"] = rescaled_every
        chosen = tokenizer(file, config.vocab_size)
        if chosen.vocab_size > config.vocab_size:
            raise UserError(
                f"--tokenizer: {chosen.kind} has {chosen.vocab_size} ids, but {file} knows only"
                f" {config.vocab_size}"
            )
        save_model_folder(destination, weights, config, chosen, info, max_shard_bytes)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Imported(file, found.naming.title, config, parameters, found.decided)


def _scale(ours: str, every: int) -> float:
    if not every or not ours.endswith(_ONTO_STREAM):
        return 1.0
    return 2.0 ** (int(ours.split(".")[1]) // every)


def _reader(
    tensors: ForeignTensors, theirs: str, shape: tuple[int, ...], scale: float
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = tensors.get(theirs)
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{tensors.label}: {theirs} is {kind}; weights are floating-point numbers")
        tensor = tensor.float().reshape(shape)
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{tensors.label}: {theirs} holds infinities or what is no number")
        return tensor * scale if scale != 1.0 else tensor

    return read
