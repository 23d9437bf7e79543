"""Classification tasks by name: those of the SpikeGPT paper on the hub, and one from the package registry."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.sources.archive import extract_cached
from spikescale.data_pipeline.sources.fetch import Package, fetch
from spikescale.errors import UserError
from spikescale.finetune.labelled import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    Labelled,
    Rows,
    labelled,
    limited,
    read_rows,
)


@dataclass(frozen=True)
class HubTask:
    """A data set of the Hugging Face hub.

    `train` are the splits whose rows are trained on; `valid` and `test` None: drawn from those rows.
    """

    path: str
    text: str
    label: str
    valid: str | None
    test: str | None
    about: str
    train: tuple[str, ...] = ("train",)


# SST-2's test labels are not public: its validation split is the test, as in GLUE's published figures.
HUB_TASKS = {
    "sst2": HubTask("stanfordnlp/sst2", "sentence", "label", None, "validation", "film reviews, 2 classes"),
    "sst5": HubTask("SetFit/sst5", "text", "label", "validation", "test", "film reviews, 5 classes"),
    # The paper draws MR's test split at random from all of it.
    "mr": HubTask(
        "cornell-movie-review-data/rotten_tomatoes",
        "text",
        "label",
        None,
        None,
        "film reviews, 2 classes",
        ("train", "validation", "test"),
    ),
    "subj": HubTask("SetFit/subj", "text", "label", None, "test", "subjective or objective, 2 classes"),
}

# Film review snippets of rottentomatoes.com, each rated from -4 to 4 by 20 readers (Hutto and Gilbert 2014).
VADER = Package(
    tool="pip",
    package="vaderSentiment",
    version="2.5",
    sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
    bytes=2451781,
)
VADER_ARCHIVE = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
VADER_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def vader_movies() -> Rows:
    """10,568 film review snippets of which readers' mean rating is above or below 0; 37 at 0 are left out.

    Ratings, not the reviewers' own stars as in MR (Pang and Lee 2005), whose snippets these mostly are.
    Raises UserError when the package cannot be fetched.
    """
    archive = extract_cached(fetch(VADER), VADER_ARCHIVE, VADER.sha256) / VADER_ARCHIVE
    file = extract_cached(archive, VADER_FILE, f"{VADER.sha256}/ratings") / VADER_FILE
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise UserError(f"{file}:{number}: has {len(fields)} columns where three were due")
        rating = float(fields[1])
        if rating:
            rows.append((fields[2].strip(), "positive" if rating > 0 else "negative"))
    return rows


PACKAGED_TASKS: dict[str, tuple[Callable[[], Rows], str]] = {
    "vader-movies": (vader_movies, "film reviews rated by 20 readers each, 2 classes; from PyPI"),
}


def task_names() -> dict[str, str]:
    """What the catalogue has, with a word on each."""
    hub = {name: f"{task.about}; {task.path} of the hub" for name, task in HUB_TASKS.items()}
    return {**{name: about for name, (_, about) in PACKAGED_TASKS.items()}, **hub}


def load_task(
    name: str,
    *,
    text: str | None = None,
    label: str | None = None,
    valid: Path | None = None,
    test: Path | None = None,
    split_seed: int = 0,
    limit: int | None = None,
) -> Labelled:
    """The task called `name`: of the catalogue, a file, a hub data set `hub:OWNER/NAME`, or a folder of one.

    `text` and `label` name columns, `valid` and `test` files with those splits; what is not given is drawn
    from the training rows by `split_seed`, 10% each. `limit`: so many training rows at most, drawn by the
    same seed, of each class in its proportion and of every class one at least. Raises UserError.
    """
    given = {
        "valid": None if valid is None else read_rows(valid, text, label),
        "test": None if test is None else read_rows(test, text, label),
    }
    title = name
    if name in PACKAGED_TASKS:
        train = PACKAGED_TASKS[name][0]()
    elif name in HUB_TASKS or name.startswith("hub:"):
        train, title = _from_hub(name, text, label, given)
    elif Path(name).exists() or Path(name).suffix:
        train, title = read_rows(Path(name), text, label), Path(name).stem
    else:
        raise UserError(
            f"data {name!r}: no such file; by name there are {', '.join(task_names())}, hub:OWNER/NAME"
        )
    task = labelled(title, train, given["valid"], given["test"], split_seed=split_seed)
    if limit is not None and limit < len(task.train):
        kept = limited(task.train, limit, len(task.classes), split_seed)
        task = replace(task, train=kept)
        task.notes.append(f"train: {limit:,} of the rows only, drawn by seed {split_seed}")
    return task


def _from_hub(
    name: str, text: str | None, label: str | None, given: dict[str, Rows | None]
) -> tuple[Rows, str]:
    """The training rows and the title; `given` takes the other splits where it has none."""
    task = HUB_TASKS.get(name)
    path = task.path if task else name.removeprefix("hub:")
    sets = _load_hub(path)
    trained = task.train if task else ("train",)
    splits = {"valid": "validation", "test": "test"}
    if task is not None:
        splits = {key: split for key in splits if (split := getattr(task, key)) is not None}
        text, label = text or task.text, label or task.label
    for split in trained:
        if split not in sets:
            raise UserError(f"{path}: has no split {split}; there are {', '.join(sets)}")
    for key, split in splits.items():
        if given[key] is None and split in sets:
            given[key] = _hub_rows(path, sets[split], text, label)
    rows = [row for split in trained for row in _hub_rows(path, sets[split], text, label)]
    return rows, name.removeprefix("hub:")


def _load_hub(path: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path)
    except Exception as error:  # the library raises requests', fsspec's and its own errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: could not be loaded from the hub ({type(error).__name__}: {reason})"
        ) from None


def _hub_rows(path: str, rows: Any, text: str | None, label: str | None) -> Rows:
    names = list(rows.column_names)
    columns = []
    for wanted, usual, option in (
        (text, TEXT_COLUMNS, "--text-column"),
        (label, LABEL_COLUMNS, "--label-column"),
    ):
        found = wanted or next((name for name in usual if name in names), None)
        if found not in names:
            missing = f"no column {found!r}" if found else f"none called {usual[0]}: say {option}"
            raise UserError(f"{path}: has {missing}; there are {', '.join(names)}")
        columns.append(found)
    feature = rows.features[columns[1]]
    title = getattr(feature, "int2str", str)  # of a ClassLabel
    return [(row[columns[0]], str(title(row[columns[1]])).strip()) for row in rows]
