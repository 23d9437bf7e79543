"""Energy as tables."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from spikescale.energy.constants import PRICES, SYNAPTIC_OPERATIONS, Prices
from spikescale.energy.operations import Part
from spikescale.energy.paper import PaperRow, erratum_ratio
from spikescale.energy.summary import CLAIM, Summary, summarise


def parts_table(name: str, parts: Sequence[Part], prices: Prices) -> Table:
    """Every part of one model, its operations and nanojoules a token."""
    table = Table(title=f"{name}: operations a token ({prices.name})")
    columns = ("layer", "part", "reads", "not 0", "MAC", "AC", "mult.", "add", "exp, div", "nJ", "share")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < 3 else "right")
    whole = sum(part.count.energy(prices) for part in parts)
    layer = ""
    for part in parts:
        if layer and part.layer != layer:
            table.add_section()
        shown = part.layer if part.layer != layer else ""
        layer = part.layer
        energy = part.count.energy(prices)
        count = part.count
        numbers = (count.mac, count.ac, count.multiply, count.add, count.special)
        table.add_row(
            shown,
            part.name.removeprefix(f"blocks.{part.layer.removeprefix('block ')}."),
            part.reads,
            "" if part.rate is None else f"{part.rate:.3f}",
            *(f"{number:,.0f}" if number else "" for number in numbers),
            f"{energy / 1e3:,.2f}",
            f"{energy / whole:.1%}",
        )
    return table


def claims_table(models: Mapping[str, Sequence[Part]], prices: Prices) -> Table:
    """The claim and, of each model, what is measured."""
    table = Table(title=f"times less energy than the float twin ({prices.name}); the paper claims {CLAIM}x")
    table.add_column("model")
    for column in (
        "spikes read by",
        "spike rate",
        "projections",
        "blocks",
        "with the head",
        "uJ a token",
        "head",
        "zeros skipped",
    ):
        table.add_column(column, justify="right")
    for name, parts in models.items():
        table.add_row(name, *_claims(summarise(parts, prices)))
    return table


def _claims(found: Summary) -> list[str]:
    return [
        f"{found.projections_reading_spikes} of {found.projections}",
        "-" if found.spike_rate is None else f"{found.spike_rate:.3f}",
        f"{found.projection_ratio:.2f}x",
        f"{found.block_ratio:.2f}x",
        f"{found.whole_ratio:.2f}x",
        f"{found.energy / 1e6:.3f}",
        f"{found.head_energy / found.energy:.1%}",
        f"{found.zero_skipping_energy / 1e6:.3f}",
    ]


def prices_table(models: Mapping[str, Sequence[Part]]) -> Table:
    """Every known technology: its prices, and what the models' whole ratio becomes."""
    table = Table(title="the same counts at other published energies (pJ), and the ratio of the whole model")
    table.add_column("prices")
    table.add_column("source")
    for column in ("MAC", "AC", *models):
        table.add_column(column, justify="right")
    for prices in PRICES.values():
        ratios = [f"{summarise(parts, prices).whole_ratio:.2f}x" for parts in models.values()]
        table.add_row(prices.name, prices.source, f"{prices.mac:.3g}", f"{prices.accumulate:.3g}", *ratios)
    return table


def synaptic_table(models: Mapping[str, Sequence[Part]]) -> Table:
    """What the accumulations alone would take on chips whose synaptic operations have been measured."""
    table = Table(title="accumulations of the projections on measured chips (uJ a token), Tang et al. 2023")
    table.add_column("chip")
    for column in ("pJ an operation", *models):
        table.add_column(column, justify="right")
    for chip, price in SYNAPTIC_OPERATIONS.items():
        taken = [sum(part.count.ac for part in parts) * price / 1e6 for parts in models.values()]
        table.add_row(chip, f"{price:g}", *(f"{value:.3f}" if value else "-" for value in taken))
    return table


def paper_table(rows: Sequence[PaperRow]) -> Table:
    """Table 1 of the paper, as printed and by its formulas."""
    printed_ratio, ratio = erratum_ratio(list(rows))
    table = Table(
        title="SpikeGPT Table 1 (pJ a block, T = 3072, d = 512, R = 0.15)",
        caption=f"overall: {printed_ratio:.1f}x with the row as printed, {ratio:.1f}x by the formulas; both"
        " suppose that every projection reads spikes, which in the released code none does",
    )
    for place, column in enumerate(
        ("", "part", "GPT", "printed", "by formula", "SpikeGPT", "printed", "by formula", "ratio", "")
    ):
        table.add_column(column, justify="right" if place in (3, 4, 6, 7, 8) else "left")
    for row in rows:
        table.add_row(
            row.part,
            row.name,
            row.gpt_formula,
            _number(row.gpt_printed),
            _number(row.gpt),
            row.spikegpt_formula,
            _number(row.spikegpt_printed),
            _number(row.spikegpt),
            "-" if row.ratio is None else f"{row.ratio:.1f}x",
            row.note,
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
