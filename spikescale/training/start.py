"""The start of launch/pretrain.py: this process trains, or starts others that do and looks after them."""

import os
import sys

from spikescale.errors import UserError
from spikescale.training.arguments import parse_arguments


def main(argv: list[str]) -> int:
    """Train, or with --ranks or --max-restarts supervise; the exit code."""
    arguments = parse_arguments(argv)
    if arguments.ranks is None and arguments.max_restarts is None:
        # Only here: a supervisor needs neither torch's memory nor its seconds.
        from spikescale.training.pretrain import main as train

        return train(argv)
    from spikescale.faults.supervisor import supervise

    try:
        return supervise(arguments, os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
