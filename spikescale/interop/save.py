"""Models as the files of other programs."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spikescale import files
from spikescale.config import ModelConfig
from spikescale.config.schema import NeuronConfig
from spikescale.errors import UserError
from spikescale.interop.naming import BLINK, HF_RWKV, Naming
from spikescale.interop.recognise import SETTINGS_FILE
from spikescale.model.store import (
    TOKENIZER,
    WEIGHTS,
    LoadedModel,
    find_model_folder,
    folder_aside,
    load_model_folder,
    refuse_occupied,
    save_model_folder,
)
from spikescale.tensor_shards import write_sharded

Format = Literal["spikescale", "spikegpt", "rwkv4", "hf-rwkv", "hf", "nir"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PTH = "model.pth"

logger = logging.getLogger(__name__)
_OF_TRAINING = {"detach_reset", "surrogate_alpha"}  # of a neuron: what running it does not depend on


def export_model(
    source: Path,
    destination: Path,
    kind: Format = "spikescale",
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> LoadedModel:
    """Write the model that `source` is or holds to the folder `destination`, in the format `kind`.

    `dtype` is of the stored weights; the spikescale format is float32. `max_shard_bytes` cuts safetensors
    into several files. Raises UserError for a model that the other program could not run as it is, and when
    `destination` already holds something.
    """
    folder = find_model_folder(source)
    refuse_occupied(destination)
    loaded = load_model_folder(folder)
    if any(hasattr(parameter, "qdata") for parameter in loaded.model.parameters()):
        raise UserError(f"{folder}: has 8-bit weights; export the model that it was made from")
    _refuse_unsupported(loaded.config, kind, dtype, max_shard_bytes)
    if loaded.config.reset_at_documents and kind not in ("spikescale", "hf"):
        logger.warning(
            "--format %s: this model forgets at the end of a document (model.reset_at_documents) and the"
            " programs for this format do not; give each document a fresh state there",
            kind,
        )
    weights = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    if kind == "spikescale":
        save_model_folder(destination, weights, loaded.config, loaded.tokenizer, loaded.info, max_shard_bytes)
    elif kind == "hf":
        from spikescale.interop.hf.export import save_hf_folder

        save_hf_folder(loaded, destination, DTYPES[dtype], max_shard_bytes)
    else:
        with folder_aside(destination) as aside:
            if kind == "nir":
                _write_nir(aside, loaded)
            elif kind == "hf-rwkv":
                _write_hf_rwkv(aside, weights, loaded, dtype, max_shard_bytes)
            else:
                torch.save(rename(weights, BLINK, DTYPES[dtype]), aside / PTH)
            described = {"config": loaded.config.model_dump(mode="json"), "info": loaded.info}
            files.write_json(aside / SETTINGS_FILE, described)
            shutil.copytree(loaded.folder / TOKENIZER, aside / TOKENIZER)
    return loaded


def rename(weights: Mapping[str, Tensor], naming: Naming, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights under another program's names, in its shapes and in `dtype`.

    Raises UserError for a weight that `dtype` has no room for.
    """
    renamed = {}
    for ours, weight in weights.items():
        narrow = weight.to(dtype)
        if not bool(narrow.isfinite().all()):
            raise UserError(
                f"--dtype {str(dtype).removeprefix('torch.')}: {ours} has values beyond its range"
            )
        shape = naming.their_shape(ours, tuple(weight.shape))
        renamed[naming.theirs(ours)] = narrow.reshape(shape).contiguous()
    return renamed


def _write_nir(folder: Path, loaded: LoadedModel) -> None:
    from spikescale.interop.nir_graph import projections, to_nir, write_nir
    from spikescale.interop.nir_simulate import GRAPH, HOST

    write_nir(folder / GRAPH, to_nir(loaded.model))
    in_graph = {f"{name}.weight" for name in projections(loaded.config)}
    rest = {name: p.detach() for name, p in loaded.model.named_parameters() if name not in in_graph}
    write_sharded(folder, HOST, rest, None, {"format": "pt"})


def _write_hf_rwkv(
    folder: Path,
    weights: Mapping[str, Tensor],
    loaded: LoadedModel,
    dtype: str,
    max_shard_bytes: int | None,
) -> None:
    write_sharded(folder, WEIGHTS, rename(weights, HF_RWKV, DTYPES[dtype]), max_shard_bytes, {"format": "pt"})
    config, eos = loaded.config, loaded.tokenizer.eos_id
    described: dict[str, Any] = {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "hidden_size": config.width,
        "attention_hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": eos,
        "eos_token_id": eos,
        # Its halving of weights and stream changes LayerNorm's epsilon; float32 has no need of it.
        "rescale_every": 0,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    files.write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")


def _refuse_unsupported(config: ModelConfig, kind: str, dtype: str, max_shard_bytes: int | None) -> None:
    if kind not in get_args(Format):
        raise UserError(f"--format {kind}: must be one of {', '.join(get_args(Format))}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if kind == "spikescale" and dtype != "float32":
        raise UserError(f"--dtype {dtype}: the spikescale format is float32")
    if kind in ("spikegpt", "rwkv4", "nir") and max_shard_bytes is not None:
        raise UserError(f"--max-shard-size: the format {kind} is one file")
    if kind == "nir":
        if dtype != "float32":
            raise UserError(f"--dtype {dtype}: the format nir is float32")
        from spikescale.interop.nir_graph import refuse_inexpressible

        refuse_inexpressible(config)
    if kind in ("rwkv4", "hf-rwkv") and config.variant != "rwkv":
        raise UserError(
            f"--format {kind}: the model's variant is {config.variant}, and RWKV-4 has no neurons"
        )
    if kind == "spikegpt":
        if config.variant != "spikegpt":
            raise UserError(f"--format spikegpt: the released code has no variant {config.variant}")
        released = NeuronConfig()
        for key in sorted(set(NeuronConfig.model_fields) - _OF_TRAINING):
            value, theirs = getattr(config.neuron, key), getattr(released, key)
            if value != theirs:
                raise UserError(f"--format spikegpt: neuron.{key} is {value}; the released code has {theirs}")
