"""`spikescale energy`: operations and energy a token of trained models, beside the paper's claim."""

import argparse
from pathlib import Path

DESCRIPTION = """Operations and energy a token, counted while the model reads a text.

  spikescale energy runs/driven --text novel.txt
  spikescale energy runs/rwkv runs/spikegpt runs/driven --text novel.txt --output energy/
  spikescale energy --table-1

A projection that reads floats costs a multiplication and an addition a weight; one that reads spikes an
addition for each spike. Which of them it is, the values that arrive decide. docs/energy.md tells what is
counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    parser.add_argument("models", type=Path, nargs="*", help="run folders, checkpoints or model folders")
    parser.add_argument("--text", type=Path, help="UTF-8 file that is read")
    parser.add_argument(
        "--prices", default="45nm-float32", help="energies of operations (--price-list shows them)"
    )
    parser.add_argument("--limit", type=int, help="read only the first tokens of the text")
    parser.add_argument("--context-length", type=int, help="tokens of a window (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows computed together")
    parser.add_argument(
        "--parts", action="store_true", help="every part of all models, not of the first only"
    )
    parser.add_argument("--output", type=Path, help="folder for energy.json and energy.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--price-list", action="store_true", help="also every known technology")
    parser.add_argument("--table-1", action="store_true", help="also Table 1 of the paper, with its erratum")
    parser.add_argument(
        "--backend", choices=("auto", "reference", "cpu"), help="operators (default: the model's)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )


def run(arguments: argparse.Namespace) -> int:
    """Count, and print tables or one JSON object."""
    import json

    from rich.console import Console

    from spikescale.energy.constants import find_prices
    from spikescale.energy.paper import table_1
    from spikescale.energy.plots import plot_energy
    from spikescale.energy.summary import as_json
    from spikescale.energy.tables import (
        claims_table,
        paper_table,
        parts_table,
        prices_table,
        synaptic_table,
    )
    from spikescale.errors import UserError
    from spikescale.files import write_json

    prices = find_prices(arguments.prices)
    if arguments.models and arguments.text is None:
        raise UserError("--text is missing: a file with the text that the model reads")
    if not arguments.models and not arguments.table_1:
        raise UserError("name a model, or ask for --table-1")
    found = _count(arguments)
    numbers = {name: as_json(parts, prices) for name, parts in found.items()}
    written = []
    if found and arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        picture, record = arguments.output / "energy.png", arguments.output / "energy.json"
        plot_energy(found, prices, picture)
        write_json(record, numbers)
        written = [record, picture]
    if arguments.json:
        print(json.dumps(numbers, indent=2))
        return 0
    # Without a terminal rich would fold tables at 80 columns.
    console = Console() if Console().is_terminal else Console(width=160)
    if found:
        shown = found if arguments.parts else dict([next(iter(found.items()))])
        for name, parts in shown.items():
            console.print(parts_table(name, parts, prices))
        console.print(claims_table(found, prices))
        if arguments.price_list:
            console.print(prices_table(found))
            console.print(synaptic_table(found))
    if arguments.table_1:
        console.print(paper_table(table_1()))
    for path in written:
        console.print(f"wrote {path}", highlight=False)
    return 0


def _count(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The parts of each model, by a name that tells them apart."""
    from spikescale.energy.count import count_operations
    from spikescale.errors import UserError
    from spikescale.inference.device import choose_device
    from spikescale.inference.reading import read_tokens, reading_progress
    from spikescale.model.store import find_model_folder, load_model_folder

    found = {}
    for path in arguments.models:
        device = choose_device(arguments.device)
        loaded = load_model_folder(find_model_folder(path), backend=arguments.backend)
        tokens = read_tokens(arguments.text, loaded.tokenizer, arguments.limit)
        length = loaded.config.context_length
        if arguments.context_length is not None:
            length = arguments.context_length
        if length < 1 or arguments.batch_size < 1:
            raise UserError("--context-length and --batch-size: both must be 1 or more")
        name = f"{path.name} ({loaded.config.variant})"
        if name in found:
            name = f"{path} ({loaded.config.variant})"
        with reading_progress(name, len(tokens)) as progress:
            found[name] = count_operations(
                loaded.model.to(device),
                tokens,
                context_length=length,
                batch_size=arguments.batch_size,
                progress=progress,
            )
    return found
