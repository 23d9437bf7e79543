#!/usr/bin/env python3
"""How often intervals of a fitted scaling law hold the truth, and from how many starts its minimum is found.

    python benchmarks/fit_coverage.py

Simulates ladders of a known law (tests/scaling/synthetic.py: 6 sizes by 5 lengths), fits each and draws its
bootstrap, with either resampling. Then fits one ladder from the starts of `fit` and from some of the 4,500 of
Hoffmann et al. 2022, Appendix D.3, with and without delta falling to its value in steps. Writes
benchmarks/results/fit_coverage.json. Takes some minutes.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, command_line, positive, show, write_results
from rich.progress import track

from spikescale.files import read_json
from spikescale.scaling.bootstrap import Interval, Resampling, predicted, resampled
from spikescale.scaling.forms import FORMS, Array, Centre
from spikescale.scaling.parametric import DELTA, STEPS, Data, fit_form, minimised

sys.path.append(str(ROOT / "tests" / "scaling"))
from synthetic import CHINCHILLA, SIZES, TOKENS, chinchilla, grid

FORM = FORMS["chinchilla"]
SYMBOLS = ("E", "alpha", "beta")
PARTS = ("coverage", "starts")
FAR = (5 * SIZES[-1], 6 * TOKENS[-1])  # a model outside the ladder: parameters and tokens
# Hoffmann et al. 2022, Appendix D.3: alpha, beta, then the logarithms of E, A and B, for N and D as they are.
PUBLISHED = (
    np.arange(0, 2.1, 0.5),
    np.arange(0, 2.1, 0.5),
    np.arange(-1, 1.1, 0.5),
    np.arange(0, 25.1, 5),
    np.arange(0, 25.1, 5),
)
SAME = 1e-4  # relative distance of the objective up to which a minimum is the best one


def coverage(
    ladders: int,
    rounds: int,
    noise: float = 0.003,
    delta: float = DELTA,
    confidence: float = 0.9,
    resampling: Resampling = "noise",
) -> dict[str, int]:
    """Of so many simulated ladders, those whose interval held the truth: of E, alpha, beta, and the loss of
    the larger model (`far`)."""
    hits = dict.fromkeys((*SYMBOLS, "far"), 0)
    for seed in track(range(ladders), description=resampling):
        data = Data.of(grid(noise=noise, seed=seed), "total")
        fitted = fit_form(FORM, data, delta)
        thetas = resampled(fitted, data, rounds, delta, seed, resampling)
        drawn = [FORM.natural(theta, fitted.centre) for theta in thetas]
        for symbol in SYMBOLS:
            found = Interval.of(0.0, np.array([d[symbol] for d in drawn]), confidence)
            hits[symbol] += bool(found.low <= CHINCHILLA[symbol] <= found.high)
        (far,) = predicted(fitted, thetas, *(np.array([x]) for x in FAR), confidence, noise=False)
        hits["far"] += bool(far.low <= chinchilla(*FAR) <= far.high)
    return hits


def published_starts(centre: Centre) -> list[Array]:
    """theta of every start of Hoffmann et al., centred."""
    return [
        np.array([e, a - alpha * centre.size, b - beta * centre.tokens, alpha, beta])
        for alpha, beta, e, a, b in itertools.product(*PUBLISHED)
    ]


def starts_that_arrive(noise: float, every: int = 1) -> dict[str, dict[str, int]]:
    """For each kind of start (of the published ones every so many): how many were tried, and how many lead to
    the lowest objective that any found, with the steps in delta and without."""
    data = Data.of(grid(noise=noise), "total")
    centre = Centre.of(data.sizes, data.tokens)
    n, d = np.log(data.sizes) - centre.size, np.log(data.tokens) - centre.tokens
    target = np.log(data.losses)
    low, high = np.array(FORM.bounds).T
    kinds = {
        "variable projection": list(FORM.starts(n, d, data.losses)),
        "published": published_starts(centre)[::every],
    }
    ways = {"with_steps": STEPS, "without_steps": STEPS[-1:]}
    objectives = {}
    for (kind, starts), (way, steps) in itertools.product(kinds.items(), ways.items()):
        objectives[kind, way] = [
            minimised(FORM, np.clip(start, low, high), n, d, target, DELTA, steps)[0]
            for start in track(starts, description=f"{kind}, {way}")
        ]
    best = min(map(min, objectives.values()))
    return {
        kind: {
            "starts": len(starts),
            **{way: sum(x <= best * (1 + SAME) for x in objectives[kind, way]) for way in ways},
        }
        for kind, starts in kinds.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "benchmarks" / "results" / "fit_coverage.json"
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what the JSON has of others stays"
    )
    parser.add_argument("--ladders", type=positive, default=100, help="simulated (default: 100)")
    parser.add_argument("--rounds", type=positive, default=60, help="of each bootstrap (default: 60)")
    parser.add_argument("--noise", type=float, default=0.003, help="of log loss (default: 0.003)")
    parser.add_argument("--confidence", type=float, default=0.9, help="of the intervals (default: 0.9)")
    parser.add_argument(
        "--every", type=positive, default=23, metavar="K", help="take each K-th published start (default: 23)"
    )
    parser.add_argument("--output", type=Path, default=default, help="where the JSON goes")
    arguments = parser.parse_args(argv)
    command = command_line("fit_coverage.py", sys.argv[1:] if argv is None else argv)
    shared = {"command": command, "law": CHINCHILLA, "sizes": list(SIZES), "tokens": list(TOKENS)}
    shared |= {"noise": arguments.noise, "delta": DELTA}
    parts = {"coverage": _coverage, "starts": _starts}
    found = {part: {**shared, **parts[part](arguments)} for part in arguments.parts}
    kept = read_json(arguments.output) if arguments.output.exists() else {}
    write_results({**{part: kept[part] for part in PARTS if part in kept}, **found}, arguments.output)
    return 0


def _coverage(arguments: argparse.Namespace) -> dict[str, Any]:
    kinds: tuple[Resampling, ...] = ("noise", "residuals")
    held = {
        kind: coverage(
            arguments.ladders,
            arguments.rounds,
            arguments.noise,
            confidence=arguments.confidence,
            resampling=kind,
        )
        for kind in kinds
    }
    columns = ["resampling", *SYMBOLS, "loss of the larger model"]
    rows = [[kind, *map(str, hits.values())] for kind, hits in held.items()]
    show(f"{arguments.confidence:.0%} intervals that held, of {arguments.ladders}", columns, rows)
    return {
        "ladders": arguments.ladders,
        "rounds": arguments.rounds,
        "confidence": arguments.confidence,
        "far": {"parameters": FAR[0], "tokens": FAR[1]},
        "held": held,
    }


def _starts(arguments: argparse.Namespace) -> dict[str, Any]:
    found = starts_that_arrive(arguments.noise, arguments.every)
    rows = [[kind, *map(str, counts.values())] for kind, counts in found.items()]
    show("starts that lead to the minimum", ["starts", "all", "with steps", "without"], rows)
    return {"published_every": arguments.every, "arrived": found}


if __name__ == "__main__":
    sys.exit(main())
