#!/usr/bin/env python3
"""Full, frozen and LoRA fine-tuning of one model on new text, beside the same training from random weights.

    spikescale data prepare --source shakespeare --tokenizer byte --output data/shakespeare-byte
    spikescale data prepare --source sotu --tokenizer byte --output data/sotu-byte
    python benchmarks/finetune.py --base runs/ablation/spikegpt-seed0 --data data/sotu-byte \\
        --kept data/shakespeare-byte

Each run is `spikescale finetune` in a process of its own; of each method's learning rates the one with the
lowest validation loss counts. Where that is the smallest or the largest that was tried, a better one may lie
beyond: the table marks it with a star, the JSON with `at_border`, and `--lrs` tries others. Runs that are
finished are not repeated.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import positive, report

from spikescale.errors import UserError
from spikescale.files import read_json

METHODS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "from random weights": (["--method", "full"], (8e-3, 1.6e-2, 3.2e-2)),
    "full": (["--method", "full"], (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "frozen": (["--method", "frozen"], (2e-3, 4e-3, 8e-3, 1.6e-2)),
    "lora": (["--method", "lora", "--rank", "8"], (1e-2, 2e-2, 4e-2, 8e-2)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing; with all of it, print the table and write the JSON. 75: not all is done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results" / "finetune.json"
    parser.add_argument("--base", type=Path, required=True, help="run or model folder to start from")
    parser.add_argument("--data", type=Path, required=True, help="prepared data to tune on")
    parser.add_argument("--kept", type=Path, required=True, help="prepared data that the base was trained on")
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"), help="where the runs go")
    parser.add_argument("--steps", type=positive, default=100, help="optimizer steps a run")
    parser.add_argument("--batch-size", type=positive, default=8, help="sequences a step")
    parser.add_argument("--test-tokens", type=positive, default=100_000, help="of each test text, at most")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads a run")
    parser.add_argument(
        "--lrs",
        action="append",
        default=[],
        metavar="METHOD=LR,LR,LR",
        help="rates of a method, three or more, in place of its own; repeatable",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument(
        "--methods",
        default=",".join(METHODS),
        help="rows to run, with commas; the JSON is written only with all of them (default: all)",
    )
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes")
    arguments = parser.parse_args(argv)
    names = [name.strip() for name in arguments.methods.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"--methods {unknown[0]}: must be of {', '.join(METHODS)}")
    end = time.monotonic() + 60 * arguments.minutes
    try:
        rates = _rates(arguments.lrs)
        found = {name: _best(arguments, name, rates[name], end) for name in names}
    except TimeoutError:
        return 75
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if found.keys() == METHODS.keys():
        _report(arguments, found)
    return 0


def _rates(given: Sequence[str]) -> dict[str, list[float]]:
    """The rates of each method, from the smallest on; `given` as METHOD=LR,LR,LR. Raises UserError."""
    rates = {name: list(own) for name, (_, own) in METHODS.items()}
    for word in given:
        name, _, values = word.partition("=")
        if name not in METHODS:
            raise UserError(f"--lrs {word}: no method {name!r}; there are {', '.join(METHODS)}")
        try:
            rates[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise UserError(f"--lrs {word}: must be METHOD=LR,LR,LR") from None
    for name, found in rates.items():
        if len(set(found)) < 3 or min(found) <= 0:
            raise UserError(f"--lrs {name}={','.join(map(str, found))}: three rates or more, all above 0")
    return {name: sorted(set(found)) for name, found in rates.items()}


def _best(arguments: argparse.Namespace, name: str, rates: list[float], end: float) -> dict[str, Any]:
    words, _ = METHODS[name]
    runs = [_run(arguments, name, [*words, "--lr", str(rate)], rate, end) for rate in rates]
    best = min(range(len(runs)), key=lambda place: runs[place]["best_valid_loss"])
    tried = {str(run["lr"]): run["best_valid_loss"] for run in runs}
    return {**runs[best], "tried": tried, "at_border": best in (0, len(runs) - 1)}


def _run(
    arguments: argparse.Namespace, name: str, words: list[str], rate: float, end: float
) -> dict[str, Any]:
    output = arguments.work / f"{name.replace(' ', '-')}-lr{rate:g}"
    base = _random_model(arguments) if name == "from random weights" else arguments.base
    if not (output / "finetune.json").exists():
        if time.monotonic() >= end:
            raise TimeoutError
        command = "import sys; from spikescale.cli.main import main; sys.exit(main(sys.argv[1:]))"
        options = {
            "--data": arguments.data,
            "--kept": arguments.kept,
            "--output": output,
            "--steps": arguments.steps,
            "--batch-size": arguments.batch_size,
            "--test-tokens": arguments.test_tokens,
            "--threads": arguments.threads,
            "--evaluate-every": max(1, arguments.steps // 5),
            "--evaluate-tokens": 16384,
            "--warmup-steps": min(10, arguments.steps),
        }
        settings = [str(word) for pair in options.items() for word in pair]
        print(f"{output} ...", flush=True)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                command,
                "finetune",
                str(base),
                *settings,
                *words,
                "--no-mlflow",
                "--json",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            raise UserError(f"{output}: ended with code {done.returncode}")
    found: dict[str, Any] = read_json(output / "finetune.json")
    return found


def _random_model(arguments: argparse.Namespace) -> Path:
    """A model of the base's settings with the weights of a new one."""
    from spikescale.model import SpikeGPT
    from spikescale.model.store import find_model_folder, load_model_folder, save_model_folder

    folder: Path = arguments.work / "random-weights"
    if not folder.exists():
        loaded = load_model_folder(find_model_folder(arguments.base))
        weights = dict(SpikeGPT(loaded.config).named_parameters())
        save_model_folder(folder, weights, loaded.config, loaded.tokenizer, {"step": 0})
    return folder


def _report(arguments: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    columns = [
        "method",
        "lr",
        "trained",
        "state MiB",
        "process peak MiB",
        "CPU s",
        "new bits/byte",
        "known bits/byte",
    ]
    before = found["full"]
    start = [
        "the model as it was",
        "-",
        "-",
        "-",
        "-",
        "-",
        _bits(before["before"]),
        _bits(before["kept_before"]),
    ]
    rows = [start]
    for name, run in found.items():
        rows.append(
            [
                name,
                f"{run['lr']:g}{' *' if run['at_border'] else ''}",
                f"{run['trainable']:,} ({run['trainable'] / run['total']:.1%})",
                f"{run['state_bytes'] / 2**20:.1f}",
                f"{run['peak_bytes'] / 2**20:.0f}",
                f"{run['cpu_seconds']:.0f}",
                _bits(run["after"]),
                _bits(run["kept_after"]),
            ]
        )
    results = {
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "test_tokens": arguments.test_tokens,
        "command": " ".join(["benchmarks/finetune.py", *sys.argv[1:]]),
        "rows": json.loads(json.dumps(found)),
    }
    report(
        f"{arguments.steps} steps of {arguments.batch_size} sequences",
        columns,
        rows,
        results,
        arguments.output,
    )
    if any(run["at_border"] for run in found.values()):
        print("* the smallest or largest rate that was tried: a better one may lie beyond it")


def _bits(result: dict[str, Any]) -> str:
    return f"{result['bits_per_byte']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
