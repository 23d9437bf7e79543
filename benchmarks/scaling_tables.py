"""The tables of docs/scaling.md out of a ladder's points, fit and prediction in benchmarks/results.

python benchmarks/scaling_tables.py byte
python benchmarks/scaling_tables.py bpe
"""

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Any

from scaling_ladder import FIG_3, LADDERS, RESULTS

from spikescale.files import read_json

FORMS = ("chinchilla", "kaplan")
Row = list[str]


def points(path: Path) -> dict[tuple[str, int], dict[int, dict[str, str]]]:
    """Finished runs by family and parameters, then by tokens."""
    found: dict[tuple[str, int], dict[int, dict[str, str]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["final"] == "true":
                place = found.setdefault((row["family"], int(row["parameters"])), {})
                place[int(row["tokens"])] = row
    return dict(sorted(found.items(), key=lambda entry: (entry[0][0] != "spikegpt", entry[0])))


def losses(found: dict[tuple[str, int], dict[int, dict[str, str]]]) -> list[Row]:
    """Loss by size and length, and the firing rate after the longest."""
    lengths = sorted({tokens for runs in found.values() for tokens in runs})
    rows = [["family", "N", "N body", *map(tokens_of, lengths), "firing"]]
    for (family, parameters), runs in found.items():
        last = runs[max(runs)]
        body, rate = int(float(last["parameters_non_embedding"])), last["firing_rate"]
        shown = [f"{float(runs[length]['loss']):.3f}" if length in runs else "" for length in lengths]
        firing = f"{float(rate):.3f}" if rate else "-"
        rows.append([family, size_of(parameters), size_of(body), *shown, firing])
    return rows


def fits(fit: dict[str, Any]) -> list[Row]:
    """Parameters of both forms with their intervals, and how well the largest size is foretold."""
    rows = [["family", "form", "parameters, 90%", "rms", "condition", "largest left out"]]
    for family, content in sorted(fit["families"].items(), reverse=True):
        for form in FORMS:
            found = content["approach_3"][form]
            shown = ", ".join(f"{name} = {interval(value)}" for name, value in found["parameters"].items())
            left = found["leave_largest_out"]
            worst = max(left["log_errors"], key=abs)
            inside = f"{left['inside_interval']} of {len(left['tokens'])} inside"
            rms, condition = found["rms_log_residual"], found["condition"]
            error = f"up to {math.expm1(worst):+.1%}, {inside}"
            rows.append([family, form, shown, f"{rms:.2%}", f"{condition:.0f}", error])
    return rows


def foretold(
    prediction: dict[str, Any], found: dict[tuple[str, int], dict[int, dict[str, str]]]
) -> list[Row]:
    """What was predicted of the largest size before it ran, and what came."""
    rows = [["family", "form", "N", "D", "predicted, 90%", "came", "error"]]
    for family, content in sorted(prediction["families"].items(), reverse=True):
        for form in FORMS:
            for asked in content["predictions"]:
                size, tokens, said = int(asked["parameters"]), int(asked["tokens"]), asked[form]
                came = float(found[family, size][tokens]["loss"])
                inside = "" if said["low"] <= came <= said["high"] else ", outside"
                error = f"{said['value'] / came - 1:+.1%}{inside}"
                words = [size_of(size), tokens_of(tokens), interval(said, ".3f"), f"{came:.3f}", error]
                rows.append([family, form, *words])
    return rows


def forecasts(fit: dict[str, Any]) -> list[Row]:
    """What the laws say of the shapes of the paper's Fig. 3."""
    rows = [["family", "form", *FIG_3]]
    for family, content in sorted(fit["families"].items(), reverse=True):
        for form in FORMS:
            shown = [interval(asked[form], ".2f") for asked in content["predictions"]]
            rows.append([family, form, *shown])
    return rows


def interval(value: dict[str, float | None], spec: str = ".3g") -> str:
    """`1.23 (1.10 to 1.40)`; a dash for what could not be determined."""
    if any(value[key] is None for key in ("value", "low", "high")):
        return "-"
    return f"{value['value']:{spec}} ({value['low']:{spec}} to {value['high']:{spec}})"


def size_of(number: int) -> str:
    """`71k` or `2.02M`."""
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"


def tokens_of(number: int) -> str:
    """`0.25M` of 249,856."""
    return f"{round(number / 1e6, 2):g}M"


def markdown(rows: list[Row]) -> str:
    """A table with its first row as the head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body, ""])


def main() -> int:
    """Print what there is of a ladder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("ladder", choices=tuple(LADDERS))
    name = parser.parse_args().ladder
    files = {end: RESULTS / f"scaling-{name}-{end}" for end in ("points.csv", "fit.json", "prediction.json")}
    found, fit = points(files["points.csv"]), read_json(files["fit.json"])
    for rows in (
        losses(found),
        fits(fit),
        foretold(read_json(files["prediction.json"]), found),
        forecasts(fit),
    ):
        print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
