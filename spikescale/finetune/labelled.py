"""Labelled texts from files, with a test and a validation split drawn where none is given."""

import csv
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikescale.errors import UserError

TEXT_COLUMNS = ("text", "sentence", "review", "content", "question")
LABEL_COLUMNS = ("label", "labels", "class", "sentiment", "category", "polarity")
MOST_CLASSES = 1000


@dataclass(frozen=True)
class Examples:
    """Texts and the numbers of their classes."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Labelled:
    """A classification task.

    Attributes:
        name: how it is called in tables.
        classes: names, by number.
        train, valid, test: the examples; no text of one is in another where the splits were made here.
        notes: how the splits came about, a line each.
    """

    name: str
    classes: list[str]
    train: Examples
    valid: Examples
    test: Examples
    notes: list[str] = field(default_factory=list)


Rows = list[tuple[str, str]]  # text, label


def read_rows(file: Path, text: str | None = None, label: str | None = None) -> Rows:
    """(text, label) of every row of a .csv, .tsv, .jsonl or .parquet file.

    `text` and `label` name the columns; None finds one by its usual names. Raises UserError naming file, line
    and column for what is missing.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    records = _records(file)
    first = next(records, None)
    if first is None:
        raise UserError(f"{file}: has no rows")
    text_key = _column(file, first[1], text, TEXT_COLUMNS, "--text-column")
    label_key = _column(file, first[1], label, LABEL_COLUMNS, "--label-column")
    rows = []
    for number, record in itertools.chain([first], records):
        for key in (text_key, label_key):
            if record.get(key) is None or not str(record[key]).strip():
                raise UserError(f"{file}:{number}: {key} is empty")
        rows.append((str(record[text_key]), _label(record[label_key])))
    return rows


def labelled(
    name: str,
    train: Rows,
    valid: Rows | None = None,
    test: Rows | None = None,
    *,
    split_seed: int = 0,
    share: float = 0.1,
    classes: Sequence[str] | None = None,
) -> Labelled:
    """A task from rows. Where `test` or `valid` is None, `share` of the training rows, drawn by `split_seed`.

    A text that occurs more than once stays on one side. Raises UserError for fewer than two classes, for a
    class that is not trained, and for too few rows.
    """
    notes = []
    if test is None:
        train, test = _drawn(train, share, split_seed, "test")
        notes.append(f"test: {len(test):,} rows, {share:.0%} of the rows, drawn by seed {split_seed}")
    if valid is None:
        train, valid = _drawn(train, share, split_seed + 1, "valid")
        notes.append(
            f"valid: {len(valid):,} rows, {share:.0%} of the training rows, drawn by seed {split_seed + 1}"
        )
    known = Counter(label for _, label in train)
    names = list(classes) if classes is not None else sorted(known, key=_by_number)
    if not 2 <= len(names) <= MOST_CLASSES:
        raise UserError(
            f"{name}: the training rows have {len(names)} classes; from 2 to {MOST_CLASSES} can be learnt"
        )
    for split, rows in (("train", train), ("valid", valid), ("test", test)):
        if not rows:
            raise UserError(f"{name}: the {split} split has no rows")
        if strange := sorted({label for _, label in rows} - set(names)):
            raise UserError(
                f"{name}: the {split} split has the class {strange[0]!r}, the training rows have not"
            )
    number = {label: index for index, label in enumerate(names)}

    def examples(rows: Rows) -> Examples:
        return Examples([text for text, _ in rows], [number[label] for _, label in rows])

    return Labelled(name, names, examples(train), examples(valid), examples(test), notes)


def _drawn(rows: Rows, share: float, seed: int, what: str) -> tuple[Rows, Rows]:
    """(what is left, what was drawn), class by class, so that both have each in its proportion."""
    groups: dict[str, list[str]] = {}  # texts by the class that they have first
    for text, label in dict(reversed(rows)).items():
        groups.setdefault(label, []).append(text)
    chosen: set[str] = set()
    for label in sorted(groups):
        texts = sorted(groups[label])
        count = round(share * len(texts))
        if not 0 < count < len(texts):
            raise UserError(f"class {label!r} has {len(texts)} rows, too few to draw {share:.0%} for {what}")
        chosen.update(random.Random(f"{seed}/{label}").sample(texts, count))
    return [row for row in rows if row[0] not in chosen], [row for row in rows if row[0] in chosen]


def limited(examples: Examples, limit: int, classes: int, seed: int) -> Examples:
    """`limit` of the examples in their order, drawn by `seed`: of each class in its proportion.

    Every class keeps one at least. Raises UserError for a limit below the number of classes.
    """
    if limit < classes:
        raise UserError(f"--limit {limit}: fewer rows than there are classes, {classes}")
    places: list[list[int]] = [[] for _ in range(classes)]
    for place, label in enumerate(examples.labels):
        places[label].append(place)
    due = [limit * len(found) / len(examples) for found in places]
    counts = [max(1, int(share)) for share in due]
    while (left := limit - sum(counts)) != 0:  # to or from the class that is furthest from its share
        open_to = [label for label in range(classes) if left > 0 or counts[label] > 1]
        step = 1 if left > 0 else -1
        counts[max(open_to, key=lambda label: step * (due[label] - counts[label]))] += step
    kept = sorted(
        place
        for label, (found, count) in enumerate(zip(places, counts, strict=True))
        for place in random.Random(f"{seed}/limit/{label}").sample(found, count)
    )
    return Examples([examples.texts[place] for place in kept], [examples.labels[place] for place in kept])


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and columns of every row."""
    suffix = file.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            with file.open(encoding="utf-8-sig", newline="") as content:
                reader = csv.DictReader(content, delimiter="\t" if suffix == ".tsv" else ",")
                for record in reader:
                    if None in record or None in record.values():
                        wanted = len(reader.fieldnames or ())
                        raise UserError(f"{file}:{reader.line_num}: a row should have {wanted} columns")
                    yield reader.line_num, record
        elif suffix in (".jsonl", ".json"):
            with file.open(encoding="utf-8") as content:
                for number, line in enumerate(content, start=1):
                    if line.strip():
                        yield number, _object(file, number, line)
        elif suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            try:
                rows = parquet.read_table(file).to_pylist()
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise UserError(f"{file}: not a readable parquet file ({error})") from None
            yield from enumerate(rows, start=1)
        else:
            raise UserError(f"{file}: must end in .csv, .tsv, .jsonl or .parquet")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def _object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{number}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{file}:{number}: must be a JSON object")
    return record


def _column(file: Path, record: dict[str, Any], wanted: str | None, usual: Sequence[str], option: str) -> str:
    names = [str(name) for name in record]
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"{file}: has no column {wanted!r}; there are {', '.join(names)}")
        return wanted
    found = next((name for name in usual if name in names), None)
    if found is None:
        raise UserError(f"{file}: none of its columns {', '.join(names)} is called {usual[0]}: say {option}")
    return found


def _label(value: Any) -> str:
    # 1.0 of a table that had a gap, and True, are the classes "1" and "True".
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _by_number(label: str) -> tuple[int, float, str]:
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
