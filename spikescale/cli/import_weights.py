"""`spikescale import`: weights of other programs as a model folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer

_KNOWN_VOCABULARIES = {50277: "neox", 50257: "gpt2", 256: "byte"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from spikescale.config.schema import Variant

    parser.add_argument(
        "source",
        type=Path,
        help="a released SpikeGPT or RWKV-4 (.pth), a transformers RWKV or SpikeGPT (.safetensors, .bin, an "
        "*.index.json), or a folder with one of them",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to make; must not hold anything yet"
    )
    parser.add_argument(
        "--variant", choices=get_args(Variant), help="what the weights are of (default: what the files say)"
    )
    parser.add_argument(
        "--tokenizer",
        help="as for `spikescale data prepare`: neox, gpt2, byte, the path of a tokenizer.json or of a saved "
        "tokenizer (default: the one that lies beside the weights)",
    )
    parser.add_argument(
        "--embedding",
        choices=("binary", "float"),
        help="whether embeddings are binarised (default: as the paper's model of this shape)",
    )
    parser.add_argument(
        "--context-length", type=int, help="tokens (default: what the files say, or 1024 as in the paper)"
    )
    parser.add_argument(
        "--rescaled-every",
        type=int,
        default=0,
        metavar="N",
        help="undo the halving of RWKV's outputs every N layers; 0: there was none",
    )
    parser.add_argument("--max-shard-size", help="cut the weights into files of at most, for example, 5GB")


def run(arguments: argparse.Namespace) -> int:
    """Import, and say what was taken for what."""
    from spikescale.interop.load import import_weights
    from spikescale.tensor_shards import parse_size

    for option in ("context_length", "rescaled_every"):
        value = getattr(arguments, option)
        if value is not None and value < (1 if option == "context_length" else 0):
            raise UserError(f"--{option.replace('_', '-')} {value}: must be a positive number")

    def tokenizer(file: Path, symbols: int) -> "Tokenizer":
        return _tokenizer(arguments.tokenizer, file, symbols)

    size = None if arguments.max_shard_size is None else parse_size(arguments.max_shard_size)
    imported = import_weights(
        arguments.source,
        arguments.output,
        tokenizer,
        variant=arguments.variant,
        embedding=arguments.embedding,
        context_length=arguments.context_length,
        rescaled_every=arguments.rescaled_every,
        max_shard_bytes=size,
    )
    config = imported.config
    print(
        f"{imported.file} ({imported.title}) -> {arguments.output}: {config.variant}, {config.layers} "
        f"layers, width {config.width}, {config.vocab_size} symbols, {imported.parameters:,} parameters"
    )
    for line in imported.decided:
        print(f"  assumed {line}")
    return 0


def _tokenizer(spec: str | None, file: Path, symbols: int) -> "Tokenizer":
    from spikescale.data_pipeline.tokenizers import load_tokenizer, make_tokenizer, parse_spec
    from spikescale.data_pipeline.tokenizers.base import DESCRIPTION

    if spec is not None:
        parsed = parse_spec(spec)
        if parsed.learns_from is not None:
            raise UserError(f"--tokenizer {spec}: is learnt from text, and there is none; give a saved one")
        return make_tokenizer(parsed)
    if (file.parent / "tokenizer" / DESCRIPTION).is_file():
        return load_tokenizer(file.parent / "tokenizer")
    if (beside := file.parent / "tokenizer.json").is_file():
        return make_tokenizer(str(beside))
    hint = ""
    if symbols in _KNOWN_VOCABULARIES:
        hint = f"; models of {symbols} symbols mostly go with --tokenizer {_KNOWN_VOCABULARIES[symbols]}"
    raise UserError(f"{file}: no tokenizer lies beside it: say --tokenizer{hint}")
