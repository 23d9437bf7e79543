"""Entry point of the `spikescale` command.

A sub-command is a module with `add_arguments(parser)` and `run(arguments) -> int`. Only the module
of the sub-command named on the command line is imported, so `spikescale --help` stays instant.
"""

import argparse
import importlib
import os
import sys

from spikescale import __version__
from spikescale.errors import UserError

COMMANDS = {
    "data": ("spikescale.cli.data", "list, prepare and inspect training data"),
    "generate": ("spikescale.cli.generate", "stream text from a trained model, token by token"),
    "evaluate": (
        "spikescale.cli.evaluate",
        "perplexity and bits of a text, last words, tasks of lm-evaluation-harness",
    ),
    "finetune": ("spikescale.cli.finetune", "train a pretrained model on new text: full, frozen, lora"),
    "ablate": ("spikescale.cli.ablate", "train the variants at equal budget over seeds, and compare them"),
    "classify": (
        "spikescale.cli.classify",
        "fine-tune on labelled texts beside baselines, over seeds",
    ),
    "export": (
        "spikescale.cli.export",
        "write a checkpoint's model as a folder of its own, for this or another program",
    ),
    "import": (
        "spikescale.cli.import_weights",
        "take over weights of SpikeGPT, RWKV-4 or transformers as a model folder",
    ),
    "checkpoint": (
        "spikescale.cli.checkpoint",
        "list, verify and consolidate the checkpoints of a run",
    ),
    "quantize": ("spikescale.cli.quantize", "a trained model with 8-bit weights, and what that costs"),
    "analyze": ("spikescale.cli.analyze", "what a model's neurons do while it reads a text"),
    "energy": ("spikescale.cli.energy", "operations and energy a token, beside the paper's claim"),
    "plan": ("spikescale.cli.plan", "memory, speed, days and cost of a run before it is started"),
    "runs": ("spikescale.cli.runs", "list and compare the runs in MLflow"),
    "scaling": ("spikescale.cli.scaling", "plan, run, fit and report scaling laws"),
    "doctor": ("spikescale.cli.doctor", "what this machine has, and what to do about what it lacks"),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option's default, and keeps line breaks in descriptions."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The argument parser; the options of `command`, if given, are filled in."""
    parser = argparse.ArgumentParser(
        prog="spikescale",
        description="Distributed pretraining of spiking language models.",
        epilog="Training is started by launch/pretrain.py under deepspeed, torchrun, srun or plain python.",
    )
    parser.add_argument("--version", action="version", version=f"spikescale {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary, formatter_class=HelpFormatter
        )
        if name == command:
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    command = next((word for word in argv if word in COMMANDS), None)
    arguments = build_parser(command).parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is its right.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry() -> None:
    """The console script."""
    sys.exit(main())
