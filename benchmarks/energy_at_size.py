"""What a whole model saves at a given firing rate, by size: element-wise work does not shrink.

    python benchmarks/energy_at_size.py

Counts the operations of untrained `spikegpt-driven` models, and prices their projections as if the given
share of what they read were spikes. Computed, not measured: `spikescale energy` tells a model's own rate.
Writes benchmarks/results/energy_at_size.json.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from common import ROOT, command_line, positive, report

from spikescale.config import load_model_preset
from spikescale.energy import PRICES, Count, Part, count_operations, summarise
from spikescale.energy.constants import DEFAULT_PRICES
from spikescale.model import SpikeGPT

PRESETS = {"tiny": 256, "46m": 256, "216m": 50277}  # and the symbols of their usual tokenizers
RATES = (0.05, 0.1, 0.15, 0.3, 0.0)


def at_rate(part: Part, rate: float) -> Part:
    """The part, a projection of it reading spikes at this rate."""
    if not part.dense:
        return part
    count = Count(ac=part.dense * rate)
    return dataclasses.replace(part, count=count, reads="spikes", rate=rate, bits=1)


def ratios(preset: str, symbols: int, tokens: int) -> dict[str, float]:
    """Times less energy than the float twin, of the whole model, by firing rate."""
    config = load_model_preset(preset, vocab_size=symbols, variant="spikegpt-driven")
    text = torch.randint(0, symbols, (tokens,), generator=torch.Generator().manual_seed(0))
    parts = count_operations(SpikeGPT(config).eval(), text, context_length=tokens)
    prices = PRICES[DEFAULT_PRICES]
    found = {rate: summarise([at_rate(part, rate) for part in parts], prices) for rate in RATES}
    return {f"{rate:g}": summary.whole_ratio for rate, summary in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Compute, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "benchmarks" / "results" / "energy_at_size.json"
    parser.add_argument(
        "--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS), help="(default: all)"
    )
    parser.add_argument("--tokens", type=positive, default=64, help="over which is counted (default: 64)")
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes")
    arguments = parser.parse_args(argv)
    found = {name: ratios(name, PRESETS[name], arguments.tokens) for name in arguments.presets}
    columns = ["preset", *(f"rate {rate:g}" for rate in RATES)]
    lines = [[name, *(f"{ratio:.1f}x" for ratio in row.values())] for name, row in found.items()]
    results = {
        "command": command_line("energy_at_size.py", sys.argv[1:] if argv is None else argv),
        "prices": DEFAULT_PRICES,
        "tokens": arguments.tokens,
        "symbols": {name: PRESETS[name] for name in found},
        "whole_ratio": found,
    }
    report(
        f"times less energy than the float twin, whole model, {DEFAULT_PRICES}",
        columns,
        lines,
        results,
        arguments.output,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
