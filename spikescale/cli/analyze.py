"""`spikescale analyze`: what a model's neurons do while it reads a text, as a page, pictures and numbers."""

import argparse
from pathlib import Path

DESCRIPTION = """What a model's neurons do while it reads a text.

  spikescale analyze runs/shakespeare --text novel.txt --output analysis/

writes analysis.html (stands alone), its pictures as PNG, and analysis.json: firing rates by layer and neuron,
rasters, membrane traces and distributions, intervals between spikes, dead and saturated neurons."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model folder")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 file that is read")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--limit", type=int, help="read only the first tokens of the text")
    parser.add_argument("--context-length", type=int, help="tokens of a window (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows computed together")
    parser.add_argument(
        "--dead-rate", type=float, default=0.0, help="a neuron that fires at no more of its tokens is dead"
    )
    parser.add_argument(
        "--saturated-rate", type=float, default=0.95, help="one that fires at no less is saturated"
    )
    parser.add_argument(
        "--backend", choices=("auto", "reference", "cpu"), help="operators (default: the model's)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )


def run(arguments: argparse.Namespace) -> int:
    """Read, write, and say what was written."""
    from spikescale.analysis.collect import analyse
    from spikescale.analysis.page import write_analysis
    from spikescale.errors import UserError
    from spikescale.inference.device import choose_device
    from spikescale.inference.reading import read_tokens, reading_progress
    from spikescale.model.store import find_model_folder, load_model_folder

    for name in ("dead_rate", "saturated_rate"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be from 0 to 1")
    device = choose_device(arguments.device)
    loaded = load_model_folder(find_model_folder(arguments.model), backend=arguments.backend)
    tokens = read_tokens(arguments.text, loaded.tokenizer, arguments.limit)
    length = loaded.config.context_length if arguments.context_length is None else arguments.context_length
    if length < 1 or arguments.batch_size < 1:
        raise UserError("--context-length and --batch-size: both must be 1 or more")
    with reading_progress("reading", len(tokens)) as progress:
        found = analyse(
            loaded.model.to(device),
            tokens,
            context_length=length,
            batch_size=arguments.batch_size,
            progress=progress,
        )
    facts = {
        "model": str(arguments.model),
        "variant": loaded.config.variant,
        "text": str(arguments.text),
        "tokens": found.tokens,
        "window": f"{length} tokens",
        "neuron": ", ".join(
            f"{key} {value}" for key, value in loaded.config.neuron.model_dump().items() if value is not False
        ),
    }
    written = write_analysis(found, arguments.output, facts, arguments.dead_rate, arguments.saturated_rate)
    for path in written:
        print(f"wrote {path}")
    return 0
