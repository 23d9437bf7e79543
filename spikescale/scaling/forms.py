"""The two published forms of a scaling law, in logarithms and with their derivatives.

Sizes and tokens enter as logarithms less their means over the points: what multiplies a power of N is then
the loss at a typical size, not at N = 1, which takes most of the correlation out of the fit. The parameters
of the fit (theta) are those of the centred form; `natural` gives the ones that papers print.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import logsumexp

Array = NDArray[np.float64]

EXPONENTS = np.geomspace(0.03, 1.6, 9)  # grid of starts, for either exponent
LEAST = 1e-2  # a coefficient of a start, which L-BFGS could not raise from 0, where its derivative is 0


@dataclass(frozen=True)
class Centre:
    """Means of log N and log D over the points."""

    size: float
    tokens: float

    @classmethod
    def of(cls, sizes: Array, tokens: Array) -> "Centre":
        """Of sizes (P,) and tokens (P,)."""
        return cls(float(np.log(sizes).mean()), float(np.log(tokens).mean()))


class Chinchilla:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, Eq. 2 and Appendix D.3).

    theta = (e, a, b, alpha, beta), with log L = logsumexp(e, a - alpha n, b - beta d).
    """

    name: ClassVar[str] = "chinchilla"
    symbols: ClassVar[tuple[str, ...]] = ("E", "A", "B", "alpha", "beta")
    bounds: ClassVar[tuple[tuple[float, float], ...]] = (
        (-12.0, 6.0),
        (-12.0, 12.0),
        (-12.0, 12.0),
        (1e-3, 3.0),
        (1e-3, 3.0),
    )

    def log_loss(self, theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
        """log L (P,) at centred log N and log D (P,), and its derivatives (P, 5)."""
        e, a, b, alpha, beta = theta
        terms = np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])
        value = logsumexp(terms, axis=0)
        share = np.exp(terms - value)
        return value, np.stack([share[0], share[1], share[2], -n * share[1], -d * share[2]], axis=1)

    def starts(self, n: Array, d: Array, loss: Array) -> Iterator[Array]:
        """Variable projection on a grid: for each pair of exponents, the best E, A, B in closed form.

        With the exponents given the form is linear in E, A and B >= 0, so that least squares of the relative
        error finds them; the search is over two numbers rather than five.
        """
        for alpha in EXPONENTS:
            for beta in EXPONENTS:
                columns = np.stack([np.ones_like(n), np.exp(-alpha * n), np.exp(-beta * d)], axis=1)
                found, _ = nnls(columns / loss[:, None], np.ones_like(loss))
                yield np.array([*np.log(np.maximum(found, LEAST)), alpha, beta])

    def natural(self, theta: Array, centre: Centre) -> dict[str, float]:
        """E, A, B, alpha, beta, for N and D as they are."""
        e, a, b, alpha, beta = (float(value) for value in theta)
        return {
            "E": float(np.exp(e)),
            "A": float(np.exp(a + alpha * centre.size)),
            "B": float(np.exp(b + beta * centre.tokens)),
            "alpha": alpha,
            "beta": beta,
        }

    def exponents(self, theta: Array) -> tuple[float, float]:
        """a and b of N_opt ~ C^a and D_opt ~ C^b."""
        alpha, beta = float(theta[3]), float(theta[4])
        return beta / (alpha + beta), alpha / (alpha + beta)

    def best_size(self, theta: Array, centre: Centre, flop: Array, factor: float) -> Array:
        """N that minimises the loss at C = factor N D, for each C."""
        _, a, b, alpha, beta = theta
        scale = np.log(alpha) + a + alpha * centre.size - np.log(beta) - b - beta * centre.tokens
        return np.exp((scale + beta * np.log(flop / factor)) / (alpha + beta))


class Kaplan:
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020, Eq. 1.5).

    theta = (log N_c, log D_c, alpha_N, alpha_D), centred. There is no irreducible loss.
    """

    name: ClassVar[str] = "kaplan"
    symbols: ClassVar[tuple[str, ...]] = ("N_c", "D_c", "alpha_N", "alpha_D")
    bounds: ClassVar[tuple[tuple[float, float], ...]] = (
        (-300.0, 300.0),
        (-300.0, 300.0),
        (1e-3, 3.0),
        (1e-3, 3.0),
    )

    def log_loss(self, theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
        """log L (P,) at centred log N and log D (P,), and its derivatives (P, 4)."""
        size, tokens, alpha_n, alpha_d = theta
        ratio = alpha_n / alpha_d
        terms = np.stack([ratio * (size - n), tokens - d])
        total = logsumexp(terms, axis=0)
        share = np.exp(terms - total)
        columns = [
            alpha_n * share[0],
            alpha_d * share[1],
            share[0] * (size - n),
            total - share[0] * terms[0],
        ]
        return alpha_d * total, np.stack(columns, axis=1)

    def starts(self, n: Array, d: Array, loss: Array) -> Iterator[Array]:
        """As of `Chinchilla`: L^(1 / alpha_D) is linear in N_c^(alpha_N / alpha_D) and D_c."""
        for alpha_n in EXPONENTS:
            for alpha_d in EXPONENTS:
                ratio = alpha_n / alpha_d
                power = np.log(loss) / alpha_d
                # In units of its largest value: a small exponent makes a huge power.
                columns = np.stack([np.exp(-ratio * n - power), np.exp(-d - power)], axis=1)
                scale = columns.max(axis=0)
                if not np.isfinite(scale).all() or (scale <= 0).any():
                    continue
                found, _ = nnls(columns / scale, np.ones_like(loss))
                size, tokens = np.log(np.maximum(found, LEAST)) - np.log(scale)
                yield np.array([size / ratio, tokens, alpha_n, alpha_d])

    def natural(self, theta: Array, centre: Centre) -> dict[str, float]:
        """N_c, D_c, alpha_N, alpha_D, for N and D as they are."""
        size, tokens, alpha_n, alpha_d = (float(value) for value in theta)
        with np.errstate(over="ignore"):
            return {
                "N_c": float(np.exp(size + centre.size)),
                "D_c": float(np.exp(tokens + centre.tokens)),
                "alpha_N": alpha_n,
                "alpha_D": alpha_d,
            }

    def exponents(self, theta: Array) -> tuple[float, float]:
        """a and b of N_opt ~ C^a and D_opt ~ C^b for this form at C = factor N D."""
        ratio = float(theta[2] / theta[3])
        return 1 / (1 + ratio), ratio / (1 + ratio)

    def best_size(self, theta: Array, centre: Centre, flop: Array, factor: float) -> Array:
        """N that minimises the loss at C = factor N D, for each C."""
        ratio = theta[2] / theta[3]
        scale = np.log(ratio) + ratio * (theta[0] + centre.size) - theta[1] - centre.tokens
        return np.exp((scale + np.log(flop / factor)) / (1 + ratio))


Form = Chinchilla | Kaplan
FORMS: dict[str, Form] = {"chinchilla": Chinchilla(), "kaplan": Kaplan()}
