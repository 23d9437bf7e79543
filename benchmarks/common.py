"""What the benchmarks share: timing, peak memory, processes of their own, tables and JSON files."""

import argparse
import json
import multiprocessing
import re
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from spikescale.data_pipeline.manifest import load_manifest
from spikescale.errors import UserError
from spikescale.files import read_json, write_json
from spikescale.model.store import SETTINGS, find_model_folder
from spikescale.tracking.environment import describe_environment

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of the repeats."""

    median: float
    fastest: float
    slowest: float

    def milliseconds(self) -> str:
        """`1.23 (1.10 to 1.40)`."""
        return f"{self.median * 1e3:.2f} ({self.fastest * 1e3:.2f} to {self.slowest * 1e3:.2f})"

    def as_dict(self) -> dict[str, float]:
        """The three under the names that the JSON files use."""
        return {
            "median_seconds": self.median,
            "fastest_seconds": self.fastest,
            "slowest_seconds": self.slowest,
        }


def measure(calls: Mapping[str, Callable[[], Any]], repeats: int, warm_up: bool = True) -> dict[str, Timing]:
    """Time every call `repeats` times, in turn, after one untimed round: a change of the machine's speed
    then touches all of them. Without `warm_up` there is no untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    if warm_up:
        for call in calls.values():
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def random_tokens(batch: int, length: int, vocab_size: int, seed: int = 0) -> Tensor:
    """(batch, length + 1) int64: inputs and, one further, targets."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length + 1), generator=generator)


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    return _process_status("VmRSS")


def peak_bytes() -> int:
    """The most that `resident_bytes` has been since `reset_peak`, or since the process began."""
    return _process_status("VmHWM")


def reset_peak() -> None:
    """Let `peak_bytes` begin anew. Raises UserError where the system does not offer it (it is Linux's)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise UserError(f"peak memory cannot be measured here: /proc/self/clear_refs: {error}") from None


def _process_status(key: str) -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise UserError(f"memory cannot be measured here: /proc/self/status: {error}") from None
    match = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
    if match is None:
        raise UserError(f"memory cannot be measured here: /proc/self/status has no {key}")
    return int(match[1]) * 1024


def in_own_process(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args) in a process that has done nothing else, so that its memory is its own.

    `function` must be importable. Raises UserError when the process dies, as it does when memory runs out.
    """
    context = multiprocessing.get_context("forkserver")
    # The server only imports what is slow to import; it runs nothing in parallel, so that its children may.
    context.set_forkserver_preload(["torch", "torch._dynamo", "omegaconf"])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise UserError(
            f"{function.__name__}{args}: its process was killed; is there enough memory?"
        ) from None


def positive(word: str) -> int:
    """A whole number from 1 on, for `type=` of an option."""
    number = int(word) if word.isascii() and word.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from 1 on")
    return number


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = Path(__file__).parent / "results" / f"{name}.json"
    parser.add_argument("--repeats", type=positive, default=15, metavar="N", help="timed calls of each kind")
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help="where the JSON goes")
    return parser


def model_arguments(description: str | None, name: str, runs: str, limit: int) -> argparse.ArgumentParser:
    """A parser for what is measured of trained models on a test split; `runs` tells of the run folders."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "benchmarks" / "results" / f"{name}.json"
    parser.add_argument("runs", type=Path, nargs="+", help=runs)
    parser.add_argument(
        "--data", type=Path, required=True, help="prepared data, of which the test split is read"
    )
    parser.add_argument(
        "--limit", type=positive, default=limit, help=f"tokens that are read (default: {limit})"
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes")
    return parser


def shown_path(path: Path) -> str:
    """A path as a JSON file names it on every machine: from the project's folder, or its last part."""
    absolute = path.absolute()  # a link stays what it was called
    return absolute.relative_to(ROOT).as_posix() if absolute.is_relative_to(ROOT) else absolute.name


def command_line(script: str, words: Sequence[str]) -> str:
    """The command that made a JSON file, for the file itself."""
    named = [shown_path(Path(word)) if Path(word).is_absolute() else word for word in words]
    return shlex.join(["python", f"benchmarks/{script}", *named])


def described_data(folder: Path) -> dict[str, str]:
    """Which prepared data it is: its source and its fingerprint. Raises UserError."""
    manifest = load_manifest(folder)
    return {"source": manifest.source, "sha256": manifest.sha256}


def described_model(run: Path) -> dict[str, Any]:
    """Which model a run (or any folder that holds one) ended with. Raises UserError."""
    settings = read_json(find_model_folder(run) / SETTINGS)
    return {"variant": settings["config"]["variant"], "weights_sha256": settings["weights_sha256"]}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table; the first column is to the left, the others to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def write_results(results: dict[str, Any], output: Path) -> None:
    """Write the results as JSON, with the machine's description."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"machine": describe_environment(), **json.loads(json.dumps(results))})


def report(
    title: str, columns: list[str], rows: list[list[str]], results: dict[str, Any], output: Path
) -> None:
    """Print the table and write the results, with the machine's description."""
    show(title, columns, rows)
    write_results(results, output)
