#!/usr/bin/env python3
"""Bits a byte of trained models by how windows advance over a text: the table of docs/evaluation.md.

    python benchmarks/evaluation_strides.py runs/ablation/rwkv-seed0 runs/ablation/spikegpt-seed0 \\
        --data data/shakespeare-byte

Every number is what `spikescale evaluate RUN --data DATA --limit N` prints with that stride, or with
`--state carry`. Writes benchmarks/results/evaluation_strides.json.
"""

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    command_line,
    described_data,
    described_model,
    model_arguments,
    positive,
    show,
    write_results,
)

from spikescale.cli.main import main as spikescale
from spikescale.errors import UserError


def evaluated(run: Path, data: Path, limit: int, options: Sequence[str]) -> dict[str, Any]:
    """What one `spikescale evaluate` prints as JSON. Raises UserError."""
    words = ["evaluate", str(run), "--data", str(data), "--limit", str(limit), "--json", *options]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = spikescale(words)
    if code:
        raise UserError(f"spikescale {' '.join(words)}: ended with code {code}")
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate each run in each way, print the table, write the JSON."""
    parser = model_arguments(__doc__, "evaluation_strides", "run folders, of one context length", 20_000)
    parser.add_argument("--strides", type=positive, nargs="+", default=[64, 16], help="(default: 64 16)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    ways = {"default": [], **{f"--stride {s}": ["--stride", str(s)] for s in arguments.strides}}
    ways["--state carry"] = ["--state", "carry"]
    rows = {}
    try:
        data = described_data(arguments.data)
        for run in arguments.runs:
            found = {
                way: evaluated(run, arguments.data, arguments.limit, options) for way, options in ways.items()
            }
            rows[run.name] = {
                **described_model(run),
                "window": found["default"]["window"],
                "tokens": found["default"]["tokens"],
                "bits_per_byte": {way: result["bits_per_byte"] for way, result in found.items()},
            }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    lines = [[name, *(f"{bits:.4f}" for bits in row["bits_per_byte"].values())] for name, row in rows.items()]
    show(f"bits a byte, the first {arguments.limit:,} tokens of the test split", ["run", *ways], lines)
    command = command_line("evaluation_strides.py", sys.argv[1:] if argv is None else argv)
    write_results(
        {"command": command, "data": data, "limit": arguments.limit, "rows": rows}, arguments.output
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
