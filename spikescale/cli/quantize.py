"""`spikescale quantize`: a trained model with eight-bit weights, and what that costs in quality."""

import argparse
from pathlib import Path

DESCRIPTION = """Write a trained model with eight-bit weights, for inference.

  spikescale quantize runs/shakespeare --output quantized/ --text held-out.txt

`spikescale evaluate` and `generate` read the folder like any other. With --text the loss on that text is
shown for the float32 model and for the quantised one. Needs the extra int8 (torchao)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model folder")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to make; must not hold anything yet"
    )
    parser.add_argument(
        "--activations",
        choices=("token", "none"),
        default="token",
        help="what projections read: token (rounded to 8 bits, one scale a token) or none (left as it is)",
    )
    parser.add_argument("--text", type=Path, help="UTF-8 file on which both models are scored")
    parser.add_argument("--limit", type=int, help="score only the first tokens of the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Quantise, score if asked, and print a table or one JSON object."""
    import json

    from spikescale.model.store import find_model_folder, load_model_folder
    from spikescale.quantization.folder import quantize_model_folder
    from spikescale.quantization.int8 import matrix_bytes
    from spikescale.quantization.quality import compare
    from spikescale.quantization.settings import Quantization

    # A text that cannot be read is refused before anything is written.
    if arguments.text is not None:
        from spikescale.inference.reading import read_tokens

        source = load_model_folder(find_model_folder(arguments.model))
        tokens = read_tokens(arguments.text, source.tokenizer, arguments.limit)
    sizes = quantize_model_folder(
        arguments.model, arguments.output, Quantization(activations=arguments.activations)
    )
    shown = {
        "model": str(arguments.output),
        "activations": arguments.activations,
        "float32 file": sizes["float32_bytes"],
        "int8 file": sizes["int8_bytes"],
        "times smaller": sizes["float32_bytes"] / sizes["int8_bytes"],
    }
    made = load_model_folder(arguments.output)
    shown["projections in memory"] = matrix_bytes(made.model)
    if arguments.text is not None:
        shown |= compare(source, made, tokens)
    if arguments.json:
        print(json.dumps({name.replace(" ", "_"): value for name, value in shown.items()}, indent=2))
        return 0
    width = max(map(len, shown))
    for name, value in shown.items():
        text = f"{value:,}" if isinstance(value, int) else str(value)
        text = f"{value:.4f}" if isinstance(value, float) else text
        print(f"{name:<{width}}  {text}")
    return 0
