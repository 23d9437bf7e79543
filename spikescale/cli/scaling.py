"""`spikescale scaling`: plan, run, fit and report scaling laws."""

import argparse
import importlib

DESCRIPTION = """Scaling laws of spiking language models and their twins without neurons.

  spikescale scaling plan --data data/docs-byte --design branches --sizes 50k:2M:6 --hours 1 --output
  plan.yaml spikescale scaling run plan.yaml --workers 2
  spikescale scaling fit runs/ladder/points.csv --output fit.json
  spikescale scaling report --plan plan.yaml --output report.html"""

COMMANDS = {
    "plan": ("spikescale.cli.scaling_plan", "a grid of runs from a compute budget, with its cost"),
    "run": ("spikescale.cli.scaling_run", "run a plan on Ray, or write it as a SLURM job array"),
    "lr": ("spikescale.cli.scaling_lr", "a learning-rate rule from the points of a sweep"),
    "report": ("spikescale.cli.scaling_report", "one HTML page and PNGs of points, fits and forecasts"),
    "fit": ("spikescale.cli.scaling_fit", "fit scaling laws to points, with intervals and warnings"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands and their options."""
    parser.description = DESCRIPTION
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        action = actions.add_parser(
            name, help=summary, description=summary, formatter_class=parser.formatter_class
        )
        module = importlib.import_module(module_name)
        module.add_arguments(action)
        action.set_defaults(run_action=module.run)


def run(arguments: argparse.Namespace) -> int:
    """Run the sub-command; its exit code."""
    return int(arguments.run_action(arguments))
