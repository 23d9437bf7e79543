"""`spikescale export`: a checkpoint's model as a folder of its own, for this or another program."""

import argparse
from pathlib import Path

FORMATS = {
    "spikescale": "this project's: float32 safetensors, settings and checksums, tokenizer",
    "spikegpt": "model.pth for the released SpikeGPT code",
    "rwkv4": "model.pth for RWKV-4's programs (variant rwkv)",
    "hf-rwkv": "transformers' RwkvForCausalLM (variant rwkv)",
    "hf": "transformers with spikescale.interop.hf: every variant, a tokenizer and a model card",
    "nir": "a NIR graph of neurons and projections, and the weights of the rest (spikegpt-driven)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", type=Path, help="run folder, checkpoint or model folder")
    parser.add_argument("destination", type=Path, help="folder to make; must not hold anything yet")
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="spikescale",
        help="; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items()),
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the stored weights; spikescale's format is float32",
    )
    parser.add_argument("--max-shard-size", help="cut safetensors into files of at most, for example, 5GB")


def run(arguments: argparse.Namespace) -> int:
    """Verify the model, write it, and say what was written."""
    from spikescale.interop.save import export_model
    from spikescale.tensor_shards import parse_size

    size = None if arguments.max_shard_size is None else parse_size(arguments.max_shard_size)
    loaded = export_model(arguments.source, arguments.destination, arguments.format, arguments.dtype, size)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    print(f"{loaded.folder} -> {arguments.destination}: {loaded.config.variant}, {parameters:,} parameters")
    return 0
