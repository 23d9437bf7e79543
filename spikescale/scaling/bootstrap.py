"""Uncertainty of a fit: parameters fitted again and again to resampled points.

`noise` keeps the points where they are and gives each a normal error of the residuals' size: right for a
planned grid of few sizes, which resampled pairs would often leave without one of them. `residuals` deals the
residuals themselves out anew; a robust fit passes through some points exactly, and their zeros make intervals
too narrow: of nominal 90% 77 to 84% held in simulation, with normal errors 82 to 88% (docs/scaling.md).
`pairs` draws whole points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import norm as normal
from scipy.stats import t as student

from spikescale.scaling.approaches import PowerLaws
from spikescale.scaling.forms import Array
from spikescale.scaling.parametric import Data, Fitted, refitted
from spikescale.scaling.points import Point

Resampling = Literal["noise", "residuals", "pairs"]


@dataclass(frozen=True)
class Interval:
    """An estimate and the limits between which it lies with the stated confidence."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, samples: Array, confidence: float) -> "Interval":
        """Percentiles of samples; infinite ones count, NaN do not."""
        known = samples[~np.isnan(samples)]
        if len(known) == 0:
            return cls(value, float("nan"), float("nan"))
        tail = 50 * (1 - confidence)
        limits = [tail, 100 - tail]
        # Between a number and infinity there is nothing to interpolate.
        if np.isfinite(known).all():
            low, high = np.percentile(known, limits)
        else:
            low, high = np.percentile(known, limits, method="inverted_cdf")
        return cls(value, float(low), float(high))

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no NaN or infinity."""
        return {key: value if np.isfinite(value) else None for key, value in vars(self).items()}


def noise_scale(fitted: Fitted) -> float:
    """Standard deviation of log L about the law, with what the K parameters took of it given back.

    The factor of Student's distribution at 90% is in it, since the deviation itself is known from P - K
    residuals.
    """
    free = max(len(fitted.residuals) - len(fitted.theta), 1)
    deviation = np.sqrt(np.sum(fitted.residuals**2) / free)
    return float(deviation * student.ppf(0.95, free) / normal.ppf(0.95))


def resampled(
    fitted: Fitted,
    data: Data,
    rounds: int,
    delta: float,
    seed: int,
    resampling: Resampling = "noise",
    progress: Callable[[], None] = lambda: None,
) -> Array:
    """theta of each round, (rounds, K)."""
    generator = np.random.default_rng(seed)
    count, parameters = len(data.losses), len(fitted.theta)
    expected = np.log(data.losses) - fitted.residuals
    scale = noise_scale(fitted)
    centred = (fitted.residuals - fitted.residuals.mean()) * np.sqrt(count / max(count - parameters, 1))
    found = np.empty((rounds, parameters))
    for index in range(rounds):
        drawn = generator.integers(count, size=count)
        if resampling == "noise":
            found[index] = refitted(fitted, data, expected + scale * generator.standard_normal(count), delta)
        elif resampling == "residuals":
            found[index] = refitted(fitted, data, expected + centred[drawn], delta)
        else:
            part = Data(data.sizes[drawn], data.tokens[drawn], data.losses[drawn], data.flop[drawn])
            found[index] = refitted(fitted, part, np.log(part.losses), delta)
        progress()
    return found


def predicted(
    fitted: Fitted, thetas: Array, sizes: Array, tokens: Array, confidence: float, noise: bool, seed: int = 0
) -> list[Interval]:
    """The loss at each (N, D) with its interval. noise: of a single run, not of the law alone."""
    generator = np.random.default_rng(seed)
    best = fitted.log_loss(sizes, tokens)
    logs = np.stack([fitted.log_loss(sizes, tokens, theta) for theta in thetas])
    if noise:
        logs = logs + noise_scale(fitted) * generator.standard_normal(logs.shape)
    return [
        Interval.of(float(np.exp(value)), np.exp(column), confidence)
        for value, column in zip(best, logs.T, strict=True)
    ]


def resampled_laws(
    points: Sequence[Point],
    fit: Callable[[Sequence[Point]], PowerLaws | None],
    rounds: int,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> list[PowerLaws]:
    """Power laws of approach 1 or 2 from resampled points; rounds that leave too few for one are dropped.

    What is drawn are runs with their curves, and points without a run: all together, or within each isoFLOP
    profile where all were planned for one. What is drawn twice counts twice, under another name.
    """
    generator = np.random.default_rng(seed)
    groups: dict[str, list[Point]] = {}
    for index, point in enumerate(points):
        groups.setdefault(point.run or f"#{index}", []).append(point)
    strata: dict[float | None, list[list[Point]]] = {}
    planned = all(point.budget for point in points)
    for group in groups.values():
        strata.setdefault(group[0].budget if planned else None, []).append(group)
    found = []
    for _ in range(rounds):
        chosen: list[Point] = []
        for members in strata.values():
            for copy, number in enumerate(generator.choice(len(members), size=len(members))):
                chosen += [replace(p, run=f"{p.run}#{copy}" if p.run else "") for p in members[number]]
        laws = fit(chosen)
        if laws is not None:
            found.append(laws)
        progress()
    return found
