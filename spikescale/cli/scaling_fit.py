"""`spikescale scaling fit`: scaling laws from points."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikescale.errors import UserError

EPILOG = """Points are CSV, JSON lines or JSON with a column for each of: parameters (or N, params, model
size); tokens (or D, training tokens) or flop (or C, compute, training FLOP); loss. Optional: run (points that
share it are a training curve), family (each is fitted apart), budget (of an isoFLOP profile),
parameters_non_embedding, lr."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = EPILOG
    add_point_arguments(parser)
    parser.add_argument(
        "--form", choices=("chinchilla", "kaplan", "both"), default="both", help="of approach 3"
    )
    parser.add_argument(
        "--approach",
        type=int,
        nargs="+",
        choices=(1, 2, 3),
        default=[1, 2, 3],
        help="of Hoffmann et al. 2022",
    )
    add_fit_arguments(parser)
    parser.add_argument(
        "--predict", nargs="+", default=[], metavar="N:D", help="predict the loss of N parameters at D tokens"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write everything as JSON")


def add_point_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say where points come from."""
    parser.add_argument("points", type=Path, nargs="*", help="files of points (.csv, .tsv, .jsonl, .json)")
    parser.add_argument("--mlflow", metavar="URI", help="read an experiment's finished runs from this store")
    parser.add_argument("--experiment", metavar="NAME", help="of --mlflow")
    parser.add_argument("--family", nargs="+", metavar="NAME", help="only these (default: all)")


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the fit itself."""
    parser.add_argument(
        "--count",
        choices=("total", "non-embedding"),
        default="total",
        help="which parameters are N; non-embedding leaves out the embedding table and the head",
    )
    parser.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss, in log L")
    parser.add_argument("--rounds", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--confidence", type=float, default=0.9, help="of the intervals")
    parser.add_argument(
        "--resample",
        choices=("noise", "residuals", "pairs"),
        default="noise",
        help="what the bootstrap draws: normal errors of the residuals' size, the residuals, or points",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def read_all(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """The points that the options name, by family. Raises UserError."""
    from spikescale.scaling.mlflow_points import read_mlflow
    from spikescale.scaling.points import by_family, read_points

    if bool(arguments.points) == bool(arguments.mlflow):
        raise UserError("give files of points, or --mlflow URI with --experiment NAME")
    if arguments.mlflow and not arguments.experiment:
        raise UserError("--mlflow needs --experiment NAME")
    points = (
        read_mlflow(arguments.mlflow, arguments.experiment)
        if arguments.mlflow
        else read_points(arguments.points)
    )
    families = by_family(points)
    wanted = arguments.family or list(families)
    for name in wanted:
        if name not in families:
            raise UserError(f"--family {name}: the points have {', '.join(families) or 'no families'}")
    return {name: families[name] for name in wanted}


def options_of(arguments: argparse.Namespace, forms: tuple[str, ...], approaches: list[int]) -> Any:
    """The options of a fit. Raises UserError for values out of range."""
    from spikescale.scaling.fit import Options

    if not 0 < arguments.confidence < 1:
        raise UserError(f"--confidence {arguments.confidence}: must be between 0 and 1")
    for name in ("rounds", "delta"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be above 0")
    return Options(
        count=arguments.count,
        forms=forms,
        approaches=approaches,
        delta=arguments.delta,
        rounds=arguments.rounds,
        confidence=arguments.confidence,
        resampling=arguments.resample,
        seed=arguments.seed,
    )


def run(arguments: argparse.Namespace) -> int:
    """Fit, print, and write."""
    from spikescale.files import write_json
    from spikescale.scaling.fit import as_json, predictions
    from spikescale.scaling.fit_tables import show_fit

    forms = ("chinchilla", "kaplan") if arguments.form == "both" else (arguments.form,)
    options = options_of(arguments, forms, arguments.approach)
    asked = [_pair(word) for word in arguments.predict]
    results = fit_all(read_all(arguments), options)
    for result in results:
        show_fit(result, asked)
    if arguments.output:
        content = {
            "format": 1,
            "count": options.count,
            "delta": options.delta,
            "rounds": options.rounds,
            "confidence": options.confidence,
            "resampling": options.resampling,
            "seed": options.seed,
            "families": {
                result.family: {**as_json(result), "predictions": predictions(result, asked)}
                for result in results
            },
        }
        try:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.output, content)
        except OSError as error:
            raise UserError(f"--output {arguments.output}: cannot be written ({error.strerror})") from None
        print(f"written: {arguments.output}")
    return 0


def fit_all(families: dict[str, list[Any]], options: Any) -> list[Any]:
    """The fit of each family, under a progress bar on a terminal."""
    from rich.progress import Progress

    from spikescale.scaling.fit import fit_family, rounds_of

    results = []
    with Progress(disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("fitting", total=rounds_of(options) * len(families))

        def advance() -> None:
            progress.advance(task)

        step: Callable[[], None] = advance
        for name, points in families.items():
            results.append(fit_family(name, points, options, step))
    return results


def _pair(word: str) -> tuple[float, float]:
    from spikescale.scaling.ladder import parse_number

    size, separator, tokens = word.partition(":")
    if not separator:
        raise UserError(f"--predict {word}: write N:D, parameters and tokens, such as 216M:0.9G")
    return parse_number(size, "--predict"), parse_number(tokens, "--predict")
