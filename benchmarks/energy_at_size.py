"""What a whole model saves at a given firing rate, by size: element-wise work does not shrink.

    python benchmarks/energy_at_size.py

Counts the operations of untrained `spikegpt-driven` models, and prices their projections as if the given
share of what they read were spikes. Computed, not measured: `spikescale energy` tells a model's own rate.
"""

import dataclasses
import sys

import torch

from spikescale.config import load_model_preset
from spikescale.energy import PRICES, Count, Part, count_operations, summarise
from spikescale.model import SpikeGPT

PRESETS = {"tiny": 256, "46m": 256, "216m": 50277}  # and the symbols of their usual tokenizers
RATES = (0.05, 0.1, 0.15, 0.3)
TOKENS = 64


def at_rate(part: Part, rate: float) -> Part:
    """The part, a projection of it reading spikes at this rate."""
    if not part.dense:
        return part
    count = Count(ac=part.dense * rate)
    return dataclasses.replace(part, count=count, reads="spikes", rate=rate, bits=1)


def main() -> int:
    """Print the table in Markdown."""
    print("| preset | " + " | ".join(f"rate {rate:g}" for rate in RATES) + " | rate 0 |")
    print("|---" * (len(RATES) + 2) + "|")
    for preset, symbols in PRESETS.items():
        config = load_model_preset(preset, vocab_size=symbols, variant="spikegpt-driven")
        tokens = torch.randint(0, symbols, (TOKENS,), generator=torch.Generator().manual_seed(0))
        parts = count_operations(SpikeGPT(config).eval(), tokens, context_length=TOKENS)
        ratios = []
        for rate in (*RATES, 0.0):
            found = summarise([at_rate(part, rate) for part in parts], PRICES["45nm-float32"])
            ratios.append(f"{found.whole_ratio:.1f}x")
        print(f"| {preset} | " + " | ".join(ratios) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
