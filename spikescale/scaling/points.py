"""What a scaling law is fitted to: one loss for each (model size, tokens).

Files have a column (CSV) or key (JSON lines) for the model's parameters, for the tokens or the FLOP it was
trained with, and for the loss; the names that are understood are in `COLUMNS`. Several points with the same
`run` are its training curve.
"""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from spikescale.errors import UserError
from spikescale.files import written_aside

Count = Literal["total", "non-embedding"]

# Our name, and others that mean the same. Compared in lower case, with "_" for spaces and hyphens.
COLUMNS: dict[str, tuple[str, ...]] = {
    "parameters": ("n", "params", "model_size", "size", "parameter_count", "n_params"),
    "parameters_non_embedding": ("non_embedding", "n_non_embedding", "params_non_embedding"),
    "tokens": ("d", "training_tokens", "train_tokens", "n_tokens", "data"),
    "flop": ("flops", "c", "compute", "training_flop", "training_flops"),
    "loss": ("l", "valid_loss", "validation_loss", "test_loss", "final_loss", "eval_loss"),
    "run": ("name", "run_name", "run_id"),
    "family": ("variant", "architecture", "model"),
    "budget": ("isoflop", "flop_budget"),
    "final": ("is_final",),
    "lr": ("learning_rate",),
    "firing_rate": ("mean_firing_rate",),
    "unique_tokens": ("dataset_tokens",),
}
FLOP_FACTOR = 6.0  # operations a parameter and token, where a file says nothing of FLOP


@dataclass(frozen=True)
class Point:
    """One loss.

    parameters: all of the model's; parameters_non_embedding: without the table of input embeddings and the
    head. tokens: read in training. flop: of the training. loss: nats a token, or any other positive loss that
    all points share. run: the run it belongs to; final: whether it is that run's last. budget: the FLOP of
    the isoFLOP profile it was planned for. unique_tokens: of the training data.
    """

    parameters: float
    tokens: float
    loss: float
    flop: float
    parameters_non_embedding: float | None = None
    run: str = ""
    family: str = ""
    budget: float | None = None
    final: bool = True
    lr: float | None = None
    firing_rate: float | None = None
    unique_tokens: float | None = None

    def size(self, count: Count) -> float:
        """The number of parameters by one of the two counts. Raises UserError when it is not known."""
        if count == "total":
            return self.parameters
        if self.parameters_non_embedding is None:
            raise UserError(
                "--count non-embedding: the points have no column parameters_non_embedding; use --count total"
            )
        return self.parameters_non_embedding

    @property
    def shape(self) -> tuple[str, float]:
        """What distinguishes models: points that share it differ in tokens only."""
        return self.family, self.parameters


def read_points(paths: Iterable[Path]) -> list[Point]:
    """The points of CSV (`.csv`), JSON lines (`.jsonl`) and JSON files (a list, or `{"points": [...]}`).

    Raises UserError naming the file, the line and what is wrong.
    """
    points: list[Point] = []
    for path in paths:
        points += _read_file(Path(path))
    if not points:
        raise UserError("no points: the files hold none")
    return points


def write_points(points: Sequence[Point], path: Path) -> None:
    """Write the points as CSV; columns that no point fills are left out."""
    rows = [asdict(point) for point in points]
    columns = [key for key in Point.__dataclass_fields__ if any(row[key] not in (None, "") for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow("" if row[key] is None else _plain(row[key]) for key in columns)


def by_family(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each family, in the order in which families appear."""
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    return families


def final_points(points: Sequence[Point]) -> list[Point]:
    """The end of each run: of a curve the point with the most tokens; points without a run all count."""
    ends: dict[tuple[str, str], Point] = {}
    alone = []
    for point in points:
        if not point.run:
            alone.append(point)
            continue
        key = (point.family, point.run)
        if key not in ends or point.tokens > ends[key].tokens:
            ends[key] = point
    return [point for point in [*alone, *ends.values()] if point.final]


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_file(path: Path) -> list[Point]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows = [(number, _json(line, path, number)) for number, line in _lines(text)]
    elif suffix == ".json":
        content = _json(text, path, 1)
        listed = content.get("points") if isinstance(content, dict) else content
        if not isinstance(listed, list):
            raise UserError(f"{path}: must be a list of points, or have a list under the key points")
        rows = list(enumerate(listed, 1))
    elif suffix in (".csv", ".tsv"):
        reader = csv.DictReader(text.splitlines(), delimiter="\t" if suffix == ".tsv" else ",")
        rows = list(enumerate(reader, 2))
    else:
        raise UserError(f"{path}: must end in .csv, .tsv, .jsonl or .json")
    if not rows:
        raise UserError(f"{path}: holds no points")
    return [_point(row, f"{path}:{number}") for number, row in rows]


def _lines(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _json(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not valid JSON ({error})") from None


def _point(row: Any, where: str) -> Point:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: must be an object with keys such as parameters, tokens, loss")
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = _known(str(key))
        if name is not None and value not in (None, ""):
            if name in found:
                raise UserError(f"{where}: {key} is a second column for {name}")
            found[name] = value
    numbers = {
        name: _number(found[name], name, where)
        for name in COLUMNS
        if name in found and name not in ("run", "family", "final")
    }
    for name in ("parameters", "loss"):
        if name not in numbers:
            raise UserError(f"{where}: no column {name} (also understood: {', '.join(COLUMNS[name])})")
    if "tokens" not in numbers and "flop" not in numbers:
        raise UserError(f"{where}: needs a column tokens or flop (also understood: d, training_flop, ...)")
    flop = numbers.get("flop", FLOP_FACTOR * numbers["parameters"] * numbers.get("tokens", 0.0))
    tokens = numbers.get("tokens", flop / (FLOP_FACTOR * numbers["parameters"]))
    numbers |= {"flop": flop, "tokens": tokens}
    return Point(
        **numbers,
        run=str(found.get("run", "")),
        family=str(found.get("family", "")),
        final=str(found.get("final", "true")).lower() in ("true", "1", "yes"),
    )


def _known(column: str) -> str | None:
    plain = column.strip().lower().replace(" ", "_").replace("-", "_")
    return next((name for name, others in COLUMNS.items() if plain == name or plain in others), None)


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {name} = {value!r}: not a number") from None
    # A neuron may be silent; everything else is counted, or has a logarithm taken.
    if not math.isfinite(number) or number < 0 or (number == 0 and name != "firing_rate"):
        raise UserError(f"{where}: {name} = {value!r}: must be a number above 0")
    return number


def with_family(points: Iterable[Point], family: str) -> list[Point]:
    """The same points under the name of a family."""
    return [replace(point, family=family) for point in points]
