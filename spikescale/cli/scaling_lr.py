"""`spikescale scaling lr`: a learning-rate rule from a sweep."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "points", type=Path, nargs="+", help="points with a column lr (.csv, .jsonl or .json)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the rule, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Fit, print and write the rule."""
    from spikescale.files import write_json
    from spikescale.scaling.learning_rate import fit_rules, rules_as_json
    from spikescale.scaling.points import read_points
    from spikescale.scaling.tables import compact, show_table

    rules = fit_rules(read_points(arguments.points))
    rows = []
    for family, rule in rules.items():
        for size, lr, border in rule.best:
            rows.append([family, compact(size), f"{lr:.2e}", f"{rule(size):.2e}", "yes" if border else ""])
    show_table(
        "best learning rates and the rule",
        ["family", "N without embeddings", "best lr", "rule", "at the border of its sweep"],
        rows,
    )
    for family, rule in rules.items():
        print(f"{family}: lr = {rule.coefficient:.4g} N^{rule.exponent:.3f}")
        if any(border for *_, border in rule.best):
            print(f"warning: {family}: a best rate lies at the border of its sweep; widen it")
    write_json(arguments.output, rules_as_json(rules))
    print(f"written: {arguments.output}")
    return 0
