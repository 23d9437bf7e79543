#!/usr/bin/env python3
"""Operations and energy a token of trained models, at every published price: the tables of docs/energy.md.

    python benchmarks/energy_variants.py runs/ablation/spikegpt-driven-seed0 runs/ablation/rwkv-seed0 \\
        runs/ablation/heaviside-rwkv-seed0 runs/ablation/spikegpt-seed0 runs/ablation/spikegpt-b-seed0 \\
        --data data/shakespeare-byte

What `spikescale energy` counts, over the first tokens of the test split of prepared data. Writes
benchmarks/results/energy.json and .png.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from common import (
    command_line,
    described_data,
    described_model,
    model_arguments,
    show,
    write_results,
)

from spikescale.data_pipeline.manifest import load_manifest
from spikescale.energy import PRICES, Part, count_operations, summarise
from spikescale.energy.constants import DEFAULT_PRICES, SYNAPTIC_OPERATIONS
from spikescale.energy.plots import plot_energy
from spikescale.errors import UserError
from spikescale.evaluation.texts import split_text
from spikescale.model.store import find_model_folder, load_model_folder


def counted(run: Path, data: Path, limit: int) -> list[Part]:
    """The parts of a run's model over the first tokens of the test split. Raises UserError."""
    loaded = load_model_folder(find_model_folder(run))
    text = split_text(load_manifest(data), "test", loaded.tokenizer, limit=limit)
    tokens = torch.as_tensor(text.tokens[:limit])
    return count_operations(loaded.model, tokens, context_length=loaded.config.context_length)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print the tables, write the JSON and the picture."""
    parser = model_arguments(__doc__, "energy", "run folders; the first is drawn layer by layer", 16_384)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        data = described_data(arguments.data)
        models = {run.name: described_model(run) for run in arguments.runs}
        parts = {run.name: counted(run, arguments.data, arguments.limit) for run in arguments.runs}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    at = {name: {p.name: summarise(found, p) for p in PRICES.values()} for name, found in parts.items()}
    accumulated = {name: sum(part.count.ac for part in found) for name, found in parts.items()}
    columns = [
        "run",
        "reading spikes",
        "spike rate",
        "projections",
        "blocks",
        "whole",
        "uJ",
        "zeros skipped, uJ",
    ]
    lines = []
    for name, by_price in at.items():
        found = by_price[DEFAULT_PRICES]
        lines.append(
            [
                name,
                f"{found.projections_reading_spikes} of {found.projections}",
                "-" if found.spike_rate is None else f"{found.spike_rate:.3f}",
                *(f"{x:.2f}x" for x in (found.projection_ratio, found.block_ratio, found.whole_ratio)),
                f"{found.energy / 1e6:.3f}",
                f"{found.zero_skipping_energy / 1e6:.3f}",
            ]
        )
    show(f"a token at {DEFAULT_PRICES}; times less than the float twin", columns, lines)
    lines = [
        [
            p.name,
            f"{p.mac:.3g}",
            f"{p.accumulate:.3g}",
            *(f"{at[name][p.name].whole_ratio:.2f}x" for name in at),
        ]
        for p in PRICES.values()
    ]
    show("the whole model at other prices (pJ)", ["prices", "MAC", "AC", *at], lines)
    results = {
        "command": command_line("energy_variants.py", sys.argv[1:] if argv is None else argv),
        "data": data,
        "limit": arguments.limit,
        "prices": {p.name: {**asdict(p), "mac": p.mac, "special": p.special} for p in PRICES.values()},
        "rows": {
            name: {
                **models[name],
                "accumulations": accumulated[name],
                "at_prices": {price: asdict(found) for price, found in by_price.items()},
                "accumulations_microjoules_on_chips": {
                    chip: accumulated[name] * price / 1e6 for chip, price in SYNAPTIC_OPERATIONS.items()
                },
            }
            for name, by_price in at.items()
        },
    }
    write_results(results, arguments.output)
    plot_energy(parts, PRICES[DEFAULT_PRICES], arguments.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
