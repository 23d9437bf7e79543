"""How commands are told which model to use: in place, or by --model."""

import argparse
from pathlib import Path

from spikescale.errors import UserError

HELP = "run folder, checkpoint or model folder; or in MLflow: runs:/ID, models:/NAME/VERSION"


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Declare both ways."""
    parser.add_argument("model", type=Path, nargs="?", help=HELP)
    parser.add_argument("--model", dest="model_option", type=Path, metavar="MODEL", help="the same")


def named_model(arguments: argparse.Namespace) -> Path:
    """The model that is named. Raises UserError unless it is named once."""
    if (arguments.model is None) == (arguments.model_option is None):
        raise UserError("name one model: a folder, runs:/ID or models:/NAME/VERSION")
    return Path(arguments.model if arguments.model is not None else arguments.model_option)
