"""What the counts amount to, beside what the paper claims."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spikescale.energy.constants import Prices
from spikescale.energy.operations import Part

CLAIM = 32.2  # SpikeGPT Table 1, "Overall"


@dataclass(frozen=True)
class Summary:
    """Picojoules a token, and how many times more the float twin takes.

    The twin is the model with all neurons removed and every projection reading floats: `rwkv` of the same
    shape. The ratios differ in what they cover: the projections of the blocks, as the paper counts; all of
    the blocks; the whole model with its vocabulary head.
    """

    energy: float
    twin_energy: float
    head_energy: float
    projection_ratio: float
    block_ratio: float
    whole_ratio: float
    zero_skipping_energy: float  # if floats that are 0 (after relu^2) were skipped, too
    spike_rate: float | None  # of what projections in blocks read, where they read spikes
    projections_reading_spikes: int
    projections: int


def summarise(parts: Sequence[Part], prices: Prices) -> Summary:
    """The summary of a model's parts at these prices."""
    blocks = [part for part in parts if part.layer.startswith("block")]
    projections = [part for part in blocks if part.kind == "projection"]
    spiking = [part for part in projections if part.bits]
    rate = None
    if spiking:
        inputs = [part.rate or 0.0 for part in spiking]
        weights = [part.dense for part in spiking]
        rate = sum(r * w for r, w in zip(inputs, weights, strict=True)) / sum(weights)
    skipped = sum(
        part.count.energy(prices) * (1 - (part.rate or 0.0)) for part in parts if part.reads == "floats"
    )
    energy = total(parts, prices)
    return Summary(
        energy=energy,
        twin_energy=twin_total(parts, prices),
        head_energy=sum(part.count.energy(prices) for part in parts if part.kind == "head"),
        projection_ratio=_ratio(twin_total(projections, prices), total(projections, prices)),
        block_ratio=_ratio(twin_total(blocks, prices), total(blocks, prices)),
        whole_ratio=_ratio(twin_total(parts, prices), energy),
        zero_skipping_energy=energy - skipped,
        spike_rate=rate,
        projections_reading_spikes=len(spiking),
        projections=len(projections),
    )


def total(parts: Sequence[Part], prices: Prices) -> float:
    """Picojoules of all parts, a token."""
    return sum(part.count.energy(prices) for part in parts)


def twin_total(parts: Sequence[Part], prices: Prices) -> float:
    """Picojoules of the same parts in the twin that has no neurons and reads floats."""
    return sum((part.count if part.twin is None else part.twin).energy(prices) for part in parts)


def _ratio(twin: float, here: float) -> float:
    return twin / here if here else float("inf")


def by_layer(parts: Sequence[Part], prices: Prices) -> dict[str, dict[str, float]]:
    """Picojoules a token of each layer by kind of part."""
    table: dict[str, dict[str, float]] = {}
    for part in parts:
        row = table.setdefault(part.layer, {})
        row[part.kind] = row.get(part.kind, 0.0) + part.count.energy(prices)
    return table


def as_json(parts: Sequence[Part], prices: Prices) -> dict[str, Any]:
    """Everything in numbers."""
    return {
        "prices": {**asdict(prices), "mac": prices.mac, "special": prices.special},
        "summary": asdict(summarise(parts, prices)),
        "claim": CLAIM,
        "picojoules_by_layer": by_layer(parts, prices),
        "parts": [{**asdict(part), "picojoules": part.count.energy(prices)} for part in parts],
    }
