"""Approach 3: the parametric form by robust regression of the logarithm of the loss.

Hoffmann et al. 2022, Appendix D.3: the Huber loss (delta 1e-3) of log L, minimised by L-BFGS from a grid of
starts. Two things are added, because the problem is badly conditioned: the starts come from variable
projection (forms.py), and delta falls to its value in steps: at 1e-3 most residuals lie on the linear part,
and the kinks between its pieces can stop the minimiser.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from spikescale.errors import UserError
from spikescale.scaling.forms import Array, Centre, Form
from spikescale.scaling.points import Count, Point

DELTA = 1e-3
POLISHED = 8  # starts of the grid that the minimiser goes on from
STEPS = (100.0, 10.0, 1.0)  # delta on the way to its value, in units of it


@dataclass(frozen=True)
class Data:
    """The points as arrays (P,)."""

    sizes: Array
    tokens: Array
    losses: Array
    flop: Array

    @classmethod
    def of(cls, points: Sequence[Point], count: Count) -> "Data":
        """The arrays of these points, sizes by `count`."""
        columns = [[p.size(count), p.tokens, p.loss, p.flop] for p in points]
        sizes, tokens, losses, flop = np.array(columns, dtype=np.float64).reshape(-1, 4).T
        return cls(sizes, tokens, losses, flop)

    @property
    def flop_factor(self) -> float:
        """C / (N D): its median; 6 where FLOP was computed from N and D."""
        return float(np.median(self.flop / (self.sizes * self.tokens)))


@dataclass(frozen=True)
class Fitted:
    """A form with its parameters. residuals: log of measured over fitted loss, (P,)."""

    form: Form
    theta: Array
    centre: Centre
    residuals: Array
    objective: float

    def log_loss(self, sizes: Array, tokens: Array, theta: Array | None = None) -> Array:
        """log of the loss at sizes and tokens, with these parameters or others of the same form."""
        n, d = np.log(sizes) - self.centre.size, np.log(tokens) - self.centre.tokens
        return self.form.log_loss(self.theta if theta is None else theta, n, d)[0]

    @property
    def natural(self) -> dict[str, float]:
        """The parameters as papers print them."""
        return self.form.natural(self.theta, self.centre)

    @property
    def at_bound(self) -> list[str]:
        """Symbols of the parameters that ended at the edge of what is searched."""
        found = []
        for symbol, value, (low, high) in zip(self.form.symbols, self.theta, self.form.bounds, strict=True):
            if min(value - low, high - value) < 1e-3 * (high - low):
                found.append(symbol)
        return found

    def condition(self, data: Data) -> float:
        """Condition number of the Jacobian of log L over the points, its columns scaled to length one."""
        n, d = np.log(data.sizes) - self.centre.size, np.log(data.tokens) - self.centre.tokens
        jacobian = self.form.log_loss(self.theta, n, d)[1]
        lengths = np.linalg.norm(jacobian, axis=0)
        if (lengths < 1e-12).any():
            return float("inf")
        return float(np.linalg.cond(jacobian / lengths))


def huber(residuals: Array, delta: float) -> tuple[float, Array]:
    """Sum of the Huber losses over delta, and its derivative by each residual."""
    size = np.abs(residuals)
    inside = size <= delta
    values = np.where(inside, 0.5 * residuals**2 / delta, size - 0.5 * delta)
    return float(values.sum()), np.where(inside, residuals / delta, np.sign(residuals))


def fit_form(form: Form, data: Data, delta: float = DELTA) -> Fitted:
    """The parameters of `form` that minimise the Huber loss of log L over the points.

    Raises UserError when there are fewer points than parameters.
    """
    least = len(form.symbols)
    if len(data.losses) < least:
        raise UserError(f"{form.name}: {least} parameters cannot be fitted to {len(data.losses)} points")
    centre = Centre.of(data.sizes, data.tokens)
    n, d = np.log(data.sizes) - centre.size, np.log(data.tokens) - centre.tokens
    target = np.log(data.losses)
    scored = []
    for start in form.starts(n, d, data.losses):
        theta = np.clip(start, *np.array(form.bounds).T)
        scored.append((huber(target - form.log_loss(theta, n, d)[0], delta)[0], theta))
    scored.sort(key=lambda pair: pair[0])
    best = min((minimised(form, theta, n, d, target, delta) for _, theta in scored[:POLISHED]), key=_first)
    return _fitted(form, best, centre, n, d, target)


def minimised(
    form: Form,
    start: Array,
    n: Array,
    d: Array,
    target: Array,
    delta: float,
    steps: Sequence[float] = STEPS,
) -> tuple[float, Array]:
    """(objective, theta) after L-BFGS from one start, delta falling to its value.

    n, d, target: centred log N, centred log D and log L, (P,).
    """

    def objective(theta: Array, width: float) -> tuple[float, Array]:
        value, jacobian = form.log_loss(theta, n, d)
        total, slope = huber(value - target, width)
        return total, slope @ jacobian

    theta = start
    found = float("inf")
    for step in steps:
        result = minimize(
            objective,
            theta,
            args=(delta * step,),
            jac=True,
            method="L-BFGS-B",
            bounds=form.bounds,
            options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-12, "gtol": 1e-8},
        )
        theta, found = result.x, float(result.fun)
    return found, theta


def refitted(fitted: Fitted, data: Data, target: Array, delta: float) -> Array:
    """theta for other losses at the same or other points, starting from a fit. target: log L (P,)."""
    n, d = np.log(data.sizes) - fitted.centre.size, np.log(data.tokens) - fitted.centre.tokens
    return minimised(fitted.form, fitted.theta, n, d, target, delta, STEPS[1:])[1]


def _fitted(
    form: Form, best: tuple[float, Array], centre: Centre, n: Array, d: Array, target: Array
) -> Fitted:
    objective, theta = best
    return Fitted(form, theta, centre, target - form.log_loss(theta, n, d)[0], objective)


def _first(pair: tuple[float, Array]) -> float:
    return pair[0]
