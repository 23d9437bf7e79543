"""What the benchmarks share: repeated timing, the machine's description, a table and a JSON file."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spikescale.files import write_json
from spikescale.tracking.environment import describe_environment


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of the repeats."""

    median: float
    fastest: float
    slowest: float

    def milliseconds(self) -> str:
        """`1.23 (1.10 to 1.40)`."""
        return f"{self.median * 1e3:.2f} ({self.fastest * 1e3:.2f} to {self.slowest * 1e3:.2f})"


def measure(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Time every call `repeats` times, in turn, after one untimed round: a change of the machine's speed
    then touches all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = Path(__file__).parent / "results" / f"{name}.json"
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="timed calls of each kind")
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help="where the JSON goes")
    return parser


def report(
    title: str, columns: list[str], rows: list[list[str]], results: dict[str, Any], output: Path
) -> None:
    """Print the table and write the results, with the machine's description."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"machine": describe_environment(), **json.loads(json.dumps(results))})
