"""A trained model as a folder that transformers reads: weights, settings, tokenizer, model card."""

import shutil
from pathlib import Path
from typing import Any

import torch

from spikescale import __version__, files
from spikescale.interop.hf.causal_lm import SpikeGPTForCausalLM
from spikescale.interop.hf.tokenizer import to_transformers
from spikescale.model.store import TOKENIZER, LoadedModel, folder_aside

CARD = "README.md"


def save_hf_folder(
    loaded: LoadedModel,
    destination: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
) -> None:
    """Write `loaded` for `AutoModelForCausalLM.from_pretrained`.

    `dtype` is of the stored weights; the model is loaded in float32 all the same. spikescale's own tokenizer
    lies in `tokenizer/` in any case, beside transformers' where it has one of the kind. Raises UserError
    when `destination` already holds something.
    """
    eos = loaded.tokenizer.eos_id
    ends = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    model = SpikeGPTForCausalLM.from_spikegpt(loaded.model, **ends, dtype="float32")
    weights = {name: weight.to(dtype).contiguous() for name, weight in model.state_dict().items()}
    size: dict[str, Any] = {"max_shard_size": "1000TB" if max_shard_bytes is None else max_shard_bytes}
    tokenizer = to_transformers(loaded.tokenizer)
    with folder_aside(destination) as aside:
        model.save_pretrained(aside, state_dict=weights, **size)
        if tokenizer is not None:
            tokenizer.model_max_length = int(1e30)  # transformers' way to say that there is no limit
            tokenizer.save_pretrained(aside)
        shutil.copytree(loaded.folder / TOKENIZER, aside / TOKENIZER)
        files.write_text(aside / CARD, model_card(loaded, tokenizer is not None))


def model_card(loaded: LoadedModel, has_tokenizer: bool = True) -> str:
    """README.md of a model: what its files and its run say, and nothing else."""
    config, neuron = loaded.config, loaded.config.neuron
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    facts = {
        "variant": config.variant,
        "parameters": f"{count:,}",
        "layers": config.layers,
        "width": config.width,
        "vocabulary": f"{config.vocab_size} ({loaded.tokenizer.kind})",
        "trained on": f"{config.context_length} tokens at a time",
        "embedding": "binary" if config.binary_embedding else "float",
    }
    if config.variant not in ("rwkv", "heaviside-rwkv"):
        reset = "soft" if neuron.soft_reset else f"to {neuron.v_reset:g}"
        changed = neuron.model_dump(exclude_defaults=True)
        beyond = {key: value for key, value in changed.items() if key not in _SHOWN}
        kind = "".join(f", {key} {value}" for key, value in beyond.items())
        facts["neurons"] = f"LIF, tau {neuron.tau:g}, threshold {neuron.v_threshold:g}, reset {reset}{kind}"
    training = {key: _shown(value) for key, value in sorted(_flat(loaded.info).items())}
    read = "AutoTokenizer.from_pretrained(folder)"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(dict.fromkeys(['spikegpt', config.variant]))}]",
        "---",
        "",
        f"# {config.variant}, {count:,} parameters",
        "",
        *_table(facts),
        "",
        "## Training",
        "",
        *(_table(training) if training else ["Nothing is recorded of it."]),
        "",
        "## Use",
        "",
        f"With spikescale {__version__} or later installed:",
        "",
        "    import spikescale.interop.hf",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "    model = AutoModelForCausalLM.from_pretrained(folder)",
    ]
    if has_tokenizer:
        lines += [
            f"    tokenizer = {read}",
            '    ids = model.generate(**tokenizer("Once more", return_tensors="pt"), max_new_tokens=100)',
            "    print(tokenizer.decode(ids[0]))",
        ]
    else:
        lines += [
            "    from pathlib import Path",
            "    from spikescale.data_pipeline.tokenizers import load_tokenizer",
            "",
            f"    # transformers has no tokenizers of the kind {loaded.tokenizer.kind}.",
            '    tokenizer = load_tokenizer(Path(folder, "tokenizer"))',
        ]
    return "\n".join(lines) + "\n"


_SHOWN = ("tau", "v_threshold", "v_reset", "soft_reset")


def _flat(info: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in info.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, (int, float, str)):
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(facts: dict[str, Any]) -> list[str]:
    rows = [f"| {_escaped(key)} | {_escaped(value)} |" for key, value in facts.items()]
    return ["| | |", "|---|---|", *rows]


def _escaped(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
