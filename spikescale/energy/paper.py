"""Table 1 of the SpikeGPT paper by its own formulas, beside what is printed there."""

from dataclasses import dataclass

E_MAC, E_AC = 4.5, 0.9  # pJ, as in the paper
LENGTH, WIDTH, RATE = 3072, 512, 0.15


@dataclass(frozen=True)
class PaperRow:
    """One row: picojoules of a block of vanilla GPT and of SpikeGPT over T tokens, and as printed.

    A difference in `note` names what is wrong with the printed number.
    """

    part: str
    name: str
    gpt_formula: str
    gpt: float
    gpt_printed: float | None
    spikegpt_formula: str
    spikegpt: float | None
    spikegpt_printed: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times more the vanilla GPT takes, by the formulas."""
        return self.gpt / self.spikegpt if self.spikegpt else None


def table_1(
    length: int = LENGTH, width: int = WIDTH, rate: float = RATE, mac: float = E_MAC, ac: float = E_AC
) -> list[PaperRow]:
    """The rows and their sum. With the paper's arguments, the printed numbers stand beside."""
    square = length * width**2
    printed = (length, width, rate, mac, ac) == (LENGTH, WIDTH, RATE, E_MAC, E_AC)
    misprint = "printed without the factor d: the formula gives d = 512 times as much"

    def row(
        part: str,
        name: str,
        gpt: tuple[str, float, float],
        spikegpt: tuple[str, float, float] | None,
        note: str = "",
    ) -> PaperRow:
        ours = spikegpt or ("-", 0.0, 0.0)
        return PaperRow(
            part,
            name,
            gpt[0],
            gpt[1],
            gpt[2] if printed else None,
            ours[0],
            ours[1] if spikegpt else None,
            ours[2] if spikegpt and printed else None,
            note,
        )

    rows = [
        row(
            "attention",
            "Q/R, K, V",
            ("E_MAC 3 T d^2", mac * 3 * square, 1.09e10),
            ("E_AC R 3 T d^2", ac * rate * 3 * square, 3.25e8),
        ),
        row(
            "attention",
            "f(Q/R, K, V)",
            ("E_MAC 2 T^2 d", mac * 2 * length**2 * width, 8.50e7),
            ("E_MAC 7 T d", mac * 7 * length * width, 4.95e7),
            misprint if printed else "",
        ),
        row("attention", "scale", ("E_MAC T^2", mac * length**2, 4.25e7), None),
        row("attention", "softmax", ("E_MAC 2 T^2", mac * 2 * length**2, 8.50e7), None),
    ]
    for name, factor, gpt, spikegpt in (
        ("layer 1", 1, 3.62e9, 1.09e8),
        ("layer 2", 4, 1.45e10, 4.35e8),
        ("layer 3", 1, 3.62e9, 1.09e8),
    ):
        rows.append(
            row(
                "FFN",
                name,
                (f"E_MAC {factor} T d^2", mac * factor * square, gpt),
                (f"E_AC R {factor} T d^2", ac * rate * factor * square, spikegpt),
            )
        )
    ours = sum(r.spikegpt or 0.0 for r in rows)
    rows.append(
        PaperRow(
            "overall",
            "",
            "",
            sum(r.gpt for r in rows),
            3.29e10 if printed else None,
            "",
            ours,
            1.02e9 if printed else None,
        )
    )
    return rows


def erratum_ratio(rows: list[PaperRow]) -> tuple[float, float]:
    """(the ratio with the misprinted row as printed, the ratio by the formulas)."""
    *parts, overall = rows
    assert overall.spikegpt is not None
    as_printed = sum(r.gpt_printed if r.note and r.gpt_printed else r.gpt for r in parts)
    return as_printed / overall.spikegpt, overall.gpt / overall.spikegpt
