"""Points whose law is known."""

import numpy as np

from spikescale.scaling.points import Point

CHINCHILLA = {"E": 0.8, "A": 30.0, "B": 300.0, "alpha": 0.35, "beta": 0.4}
KAPLAN = {"N_c": 8.8e7, "D_c": 5.4e7, "alpha_N": 0.12, "alpha_D": 0.2}
SIZES = np.geomspace(5e4, 2e6, 6)
TOKENS = np.geomspace(5e5, 8e6, 5)


def chinchilla(n, d):
    c = CHINCHILLA
    return c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["beta"]


def kaplan(n, d):
    k = KAPLAN
    return ((k["N_c"] / n) ** (k["alpha_N"] / k["alpha_D"]) + k["D_c"] / d) ** k["alpha_D"]


def grid(law=chinchilla, noise=0.0, seed=0, sizes=SIZES, tokens=TOKENS):
    """One point for each size and number of tokens, with log-normal noise."""
    generator = np.random.default_rng(seed)
    return [
        Point(n, d, float(law(n, d) * np.exp(noise * generator.standard_normal())), 6 * n * d)
        for n in sizes
        for d in tokens
    ]
