"""`spikescale doctor`: what this machine has, and what to do about what it lacks."""

import argparse
import json
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--mlflow-uri", help="store to reach, for example sqlite:///runs/mlflow.db or a server"
    )
    parser.add_argument(
        "--deep", action="store_true", help="also import DeepSpeed and start Ray (up to a minute)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the checks; 1 when something required is missing, else 0."""
    from spikescale.doctor import examine

    checks = examine(arguments.mlflow_uri, arguments.deep)
    failed = [check.name for check in checks if check.failed]
    if arguments.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.status:<7}  {check.name:<{width}}  {check.detail}")
            if check.remedy:
                print(f"{'':<7}  {'':<{width}}  -> {check.remedy}")
        print(f"missing and required: {', '.join(failed)}" if failed else "everything required is here")
    return 1 if failed else 0
