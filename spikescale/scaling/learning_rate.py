"""The learning rate as a power of the model's size, from a sweep of small models.

The best rate of each size is the minimum of a parabola through its lowest losses in log lr; over sizes it
follows lr = c N^-p, N without embeddings. Outside the sizes of the sweep the rule extrapolates, and says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikescale.errors import UserError
from spikescale.files import read_json
from spikescale.scaling.points import Point, by_family, final_points

FORMAT = 1


@dataclass(frozen=True)
class Rule:
    """lr = coefficient * N^exponent of a family. best: (N, lr, whether it is at the border of its sweep)."""

    coefficient: float
    exponent: float
    best: tuple[tuple[float, float, bool], ...]

    def __call__(self, parameters: float) -> float:
        """The rate for a number of non-embedding parameters."""
        return self.coefficient * parameters**self.exponent


def fit_rules(points: Sequence[Point]) -> dict[str, Rule]:
    """A rule for each family. Raises UserError for points without rates, or with too few of them."""
    rules = {}
    for family, members in by_family(final_points(points)).items():
        sizes: dict[float, list[Point]] = {}
        for point in members:
            if point.lr is None:
                raise UserError(f"a point of {family or 'the file'} has no learning rate (column lr)")
            sizes.setdefault(point.size("non-embedding"), []).append(point)
        best = tuple((size, *_best_rate(size, sizes[size])) for size in sorted(sizes))
        if len(best) > 1:
            sizes_and_rates = np.log([[size, lr] for size, lr, _ in best])
            slope, level = np.polyfit(sizes_and_rates[:, 0], sizes_and_rates[:, 1], 1)
        else:
            slope, level = 0.0, math.log(best[0][1])
        rules[family] = Rule(float(np.exp(level)), float(slope), best)
    return rules


def _best_rate(size: float, points: Sequence[Point]) -> tuple[float, bool]:
    ordered = sorted(points, key=lambda point: point.lr or 0.0)
    if len({point.lr for point in ordered}) < 3:
        raise UserError(f"{size:.3g} parameters: {len(ordered)} learning rates, and a parabola needs 3")
    losses = [point.loss for point in ordered]
    lowest = int(np.argmin(losses))
    if lowest in (0, len(ordered) - 1):
        return float(ordered[lowest].lr or 0.0), True
    near = ordered[lowest - 1 : lowest + 2]
    rates = np.log([float(point.lr or 0.0) for point in near])
    bend, slope, _ = np.polyfit(rates, [point.loss for point in near], 2)
    return float(np.exp(-slope / (2 * bend))), False


def rules_as_json(rules: dict[str, Rule]) -> dict[str, Any]:
    """What `read_rules` reads."""
    return {
        "format": FORMAT,
        "families": {
            family: {
                "coefficient": rule.coefficient,
                "exponent": rule.exponent,
                "best": [
                    {"parameters_non_embedding": size, "lr": lr, "at_border": border}
                    for size, lr, border in rule.best
                ],
            }
            for family, rule in rules.items()
        },
    }


def read_rules(path: Path) -> dict[str, Rule]:
    """The rules in a file that `spikescale scaling lr` wrote. Raises UserError."""
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise KeyError("format")
        return {
            family: Rule(
                float(rule["coefficient"]),
                float(rule["exponent"]),
                tuple((b["parameters_non_embedding"], b["lr"], b["at_border"]) for b in rule["best"]),
            )
            for family, rule in content["families"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not a learning-rate rule; `spikescale scaling lr` writes them") from None
