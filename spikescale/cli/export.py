"""`spikescale export`: a checkpoint's weights as a folder that stands on its own."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", type=Path, help="run folder, checkpoint or model folder")
    parser.add_argument("destination", type=Path, help="folder to make; must not hold anything yet")


def run(arguments: argparse.Namespace) -> int:
    """Verify the model, copy it, and say what was copied."""
    from spikescale.model.store import export_model_folder

    loaded = export_model_folder(arguments.source, arguments.destination)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    print(f"{loaded.folder} -> {arguments.destination}: {loaded.config.variant}, {parameters:,} parameters")
    return 0
