"""Approaches 1 and 2 of Hoffmann et al. 2022: the best size for each compute, found without a parametric
form.

Both end in power laws N_opt = G C^a and D_opt = H C^b through points (C, N_opt, D_opt): of approach 1 where a
training curve is the lowest of all at its FLOP, of approach 2 the minima of parabolas in log N through runs
of equal FLOP.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from spikescale.scaling.forms import Array
from spikescale.scaling.points import Count, Point, final_points

BINS = 200  # of FLOP, at which the training curves are compared
SAME_FLOP = 0.1  # relative difference up to which points belong to one isoFLOP profile
LEAST_SIZES = 4  # of a profile


@dataclass(frozen=True)
class Optimum:
    """The best size at one compute. border: it lies at or beyond the smallest or largest size tried."""

    flop: float
    size: float
    tokens: float
    loss: float
    border: bool


@dataclass(frozen=True)
class PowerLaws:
    """N_opt = G C^a and D_opt = H C^b."""

    a: float
    b: float
    log_g: float
    log_h: float

    def size(self, flop: Array) -> Array:
        """N_opt at each FLOP."""
        return np.exp(self.log_g + self.a * np.log(flop))

    def tokens(self, flop: Array) -> Array:
        """D_opt at each FLOP."""
        return np.exp(self.log_h + self.b * np.log(flop))


@dataclass(frozen=True)
class Profile:
    """Points of (nearly) equal FLOP and the parabola loss = c0 + c1 x + c2 x^2 in x = log N.

    interpolated: the losses were read off between the runs of each size.
    """

    flop: float
    sizes: Array
    tokens: Array
    losses: Array
    parabola: Array  # (c2, c1, c0), in log N less its mean
    centre: float
    interpolated: bool

    @property
    def convex(self) -> bool:
        """Whether the parabola has a minimum."""
        return bool(self.parabola[0] > 0)

    @property
    def log_best(self) -> float:
        """log N of the minimum."""
        return float(self.centre - self.parabola[1] / (2 * self.parabola[0]))

    def optimum(self) -> Optimum:
        """The minimum. Only for a convex profile."""
        order = np.argsort(self.sizes)
        size = float(np.exp(self.log_best))
        ordered = np.log(self.sizes[order])
        border = not ordered[0] < self.log_best < ordered[-1]
        tokens = float(np.exp(np.interp(self.log_best, ordered, np.log(self.tokens[order]))))
        x = self.log_best - self.centre
        return Optimum(self.flop, size, tokens, float(np.polyval(self.parabola, x)), bool(border))

    @property
    def off_centre(self) -> float:
        """Distance of the minimum from the middle of the sizes tried, in half-widths of their log range."""
        logs = np.log(self.sizes)
        middle, half = (logs.max() + logs.min()) / 2, (logs.max() - logs.min()) / 2
        return float(abs(self.log_best - middle) / half)


def power_laws(optima: Sequence[Optimum]) -> PowerLaws | None:
    """Least squares in logarithms; None with fewer than two different FLOP."""
    if len({optimum.flop for optimum in optima}) < 2:
        return None
    flop, sizes, tokens = np.log([[o.flop, o.size, o.tokens] for o in optima]).T
    a, log_g = np.polyfit(flop, sizes, 1)
    b, log_h = np.polyfit(flop, tokens, 1)
    return PowerLaws(float(a), float(b), float(log_g), float(log_h))


def envelope(points: Sequence[Point], count: Count, bins: int = BINS) -> list[Optimum]:
    """Approach 1: at each of `bins` FLOP the size whose training curve is lowest.

    Curves are interpolated in log FLOP, never beyond their ends. A FLOP counts where at least `LEAST_SIZES`
    sizes have a curve; where the lowest is the smallest or largest of them, the optimum is marked as at the
    border.
    """
    curves = _curves(points, count)
    if len({size for size, *_ in curves}) < LEAST_SIZES:
        return []
    low = min(flop.min() for _, flop, _, _ in curves)
    high = max(flop.max() for _, flop, _, _ in curves)
    optima = []
    for flop in np.geomspace(low, high, bins):
        there = [
            (float(np.interp(np.log(flop), np.log(x), losses)), size, _at(flop, x, tokens))
            for size, x, tokens, losses in curves
            if x.min() <= flop <= x.max()
        ]
        sizes = {size for _, size, _ in there}
        if len(sizes) >= LEAST_SIZES:
            loss, size, tokens = min(there)
            optima.append(Optimum(float(flop), size, tokens, loss, size in (min(sizes), max(sizes))))
    return optima


def has_curves(points: Sequence[Point]) -> bool:
    """Whether any run that ended has three points or more."""
    ended = {point.run for point in points if point.final}
    lengths = Counter(point.run for point in points if point.run and point.run in ended)
    return max(lengths.values(), default=0) > 2


def _curves(points: Sequence[Point], count: Count) -> list[tuple[float, Array, Array, Array]]:
    """(size, FLOP, tokens, losses) of each training curve; where there are none, the ends of a size's runs.

    A run without a final point gives none: a trunk's losses are those of a rate that never decayed.
    """
    ended = {point.run for point in points if point.final}
    used = [point for point in points if point.run in ended]
    curved = has_curves(points)
    curves: dict[tuple[str, float], list[Point]] = {}
    for point in used:
        if curved or point.final:
            curves.setdefault((point.run if curved else "", point.size(count)), []).append(point)
    found = []
    for (_, size), members in curves.items():
        ordered = sorted(members, key=lambda point: point.flop)
        if len(ordered) >= 2:
            flop, tokens, losses = np.array([[p.flop, p.tokens, p.loss] for p in ordered]).T
            found.append((size, flop, tokens, losses))
    return found


def _at(flop: float, x: Array, tokens: Array) -> float:
    return float(np.exp(np.interp(np.log(flop), np.log(x), np.log(tokens))))


def profiles(points: Sequence[Point], count: Count) -> list[Profile]:
    """Approach 2: the isoFLOP profiles among the final points, each with its parabola.

    Where runs were not planned at equal FLOP but each size has several lengths, log loss is interpolated in
    log FLOP between them, at as many FLOP as there are lengths.
    """
    finals = final_points(points)
    found = [
        _profile(float(np.median([p.flop for p in group])), _columns(group, count), False)
        for group in _equal_flop(finals)
        if len({p.size(count) for p in group}) >= LEAST_SIZES
    ]
    return found if len(found) >= 2 else _interpolated(finals, count)


def _columns(group: Sequence[Point], count: Count) -> tuple[Array, Array, Array]:
    sizes, tokens, losses = np.array([[p.size(count), p.tokens, p.loss] for p in group]).T
    return sizes, tokens, losses


def _equal_flop(points: Sequence[Point]) -> list[list[Point]]:
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda p: p.budget or p.flop):
        flop = point.budget or point.flop
        first = groups[-1][0] if groups else None
        if first is not None and flop <= (first.budget or first.flop) * (1 + SAME_FLOP):
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _interpolated(points: Sequence[Point], count: Count) -> list[Profile]:
    by_size: dict[float, list[Point]] = {}
    for point in points:
        by_size.setdefault(point.size(count), []).append(point)
    ladders = {size: sorted(g, key=lambda p: p.flop) for size, g in by_size.items() if _lengths(g) >= 2}
    if len(ladders) < LEAST_SIZES:
        return []
    # FLOP that at least LEAST_SIZES sizes reach from both sides.
    low = sorted(g[0].flop for g in ladders.values())[LEAST_SIZES - 1]
    high = sorted((g[-1].flop for g in ladders.values()), reverse=True)[LEAST_SIZES - 1]
    if low >= high:
        return []
    found = []
    for flop in np.geomspace(low, high, max(_lengths(g) for g in ladders.values())):
        rows = []
        for size, group in ladders.items():
            x = np.array([p.flop for p in group])
            if x[0] * (1 - 1e-9) <= flop <= x[-1] * (1 + 1e-9):
                loss = np.exp(np.interp(np.log(flop), np.log(x), np.log([p.loss for p in group])))
                rows.append((size, _at(flop, x, np.array([p.tokens for p in group])), float(loss)))
        if len(rows) >= LEAST_SIZES:
            sizes, tokens, losses = np.array(rows).T
            found.append(_profile(float(flop), (sizes, tokens, losses), True))
    return found


def _lengths(group: Sequence[Point]) -> int:
    return len({point.flop for point in group})  # a resample holds points more than once


def _profile(flop: float, columns: tuple[Array, Array, Array], interpolated: bool) -> Profile:
    sizes, tokens, losses = columns
    x = np.log(sizes)
    return Profile(
        flop, sizes, tokens, losses, np.polyfit(x - x.mean(), losses, 2), float(x.mean()), interpolated
    )


def optima_of(found: Sequence[Profile]) -> list[Optimum]:
    """The minima that lie within the sizes tried: what a power law may rest on."""
    return inside(profile.optimum() for profile in found if profile.convex)


def inside(optima: Iterable[Optimum]) -> list[Optimum]:
    """The optima that are not at the border."""
    return [optimum for optimum in optima if not optimum.border]
