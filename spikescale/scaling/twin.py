"""A spiking family against its twin without neurons: how many parameters a model is worth.

The effective parameters of a model are those that its twin needs, on the same tokens, for the same loss: the
N at which the twin's fitted law gives that loss. Their ratio to the model's own parameters is 1 where spikes
cost nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spikescale.scaling.bootstrap import Interval
from spikescale.scaling.fit import FormResult
from spikescale.scaling.forms import Array
from spikescale.scaling.points import Count, Point, final_points

TWIN = "rwkv"
GRID = np.geomspace(1e-4, 1e4, 2001)  # of the ratio that is searched


@dataclass(frozen=True)
class Worth:
    """One model: its parameters, tokens, and the twin's parameters over its own.

    outside: the twin's parameters are fewer or more than any twin's that was trained.
    """

    size: float
    tokens: float
    loss: float
    ratio: Interval
    outside: bool


def effective_ratio(form: FormResult, size: float, tokens: float, loss: float, theta: Array) -> float:
    """N of the law over `size` at which the law gives `loss`; inf when no size does, 0 when any does."""
    logs = form.fitted.log_loss(size * GRID, np.full_like(GRID, tokens), theta)
    target = np.log(loss)
    if target <= logs[-1]:
        return float("inf")
    if target >= logs[0]:
        return 0.0
    return float(np.exp(np.interp(-target, -logs, np.log(GRID))))


def worth(points: Sequence[Point], twin: FormResult, count: Count) -> list[Worth]:
    """Every final point of the spiking family against the twin's law; intervals are those of that law."""
    found = []
    for point in sorted(final_points(points), key=lambda p: (p.tokens, p.size(count))):
        size = point.size(count)
        best = effective_ratio(twin, size, point.tokens, point.loss, twin.fitted.theta)
        drawn = [effective_ratio(twin, size, point.tokens, point.loss, theta) for theta in twin.thetas]
        interval = Interval.of(best, np.array(drawn), twin.confidence)
        outside = not twin.data.sizes.min() <= best * size <= twin.data.sizes.max()
        found.append(Worth(size, point.tokens, point.loss, interval, outside))
    return found
