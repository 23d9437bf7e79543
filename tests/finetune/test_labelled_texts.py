"""Labelled texts: read from files, split without leaks, refused by file, line and column."""

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from spikescale.errors import UserError
from spikescale.finetune import tasks
from spikescale.finetune.classify import class_weights
from spikescale.finetune.labelled import Labelled, labelled, read_rows
from spikescale.finetune.tasks import HUB_TASKS, load_task

ROWS = [(f"text {number}, with a comma", "good" if number % 3 else "bad") for number in range(60)]


def write(file: Path, text: str = "text", label: str = "label") -> Path:
    if file.suffix == ".jsonl":
        lines = [json.dumps({"id": 1, text: a, label: b}) for a, b in ROWS]
        file.write_text("\n".join(lines) + "\n\n")
    elif file.suffix == ".parquet":
        parquet.write_table(pyarrow.table({text: [a for a, _ in ROWS], label: [b for _, b in ROWS]}), file)
    else:
        cut = "\t" if file.suffix == ".tsv" else ","
        lines = [cut.join((f'"{a}"', b)) for a, b in ROWS]
        file.write_text("\ufeff" + "\n".join([f"{text}{cut}{label}", *lines]) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_are_read_from_every_kind_of_file(tmp_path, suffix):
    assert read_rows(write(tmp_path / f"a.{suffix}")) == ROWS
    assert read_rows(write(tmp_path / f"b.{suffix}", "sentence", "sentiment")) == ROWS
    odd = write(tmp_path / f"c.{suffix}", "what", "verdict")
    assert read_rows(odd, "what", "verdict") == ROWS
    with pytest.raises(UserError, match=r"none of its columns .* is called text: say --text-column"):
        read_rows(odd)


def test_numbers_are_classes_in_their_order(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"t{n}", "label": float(n % 11)}) + "\n" for n in range(220))
    )
    task = labelled("a", read_rows(tmp_path / "a.jsonl"))
    assert task.classes == [str(number) for number in range(11)]


def test_drawn_splits_hold_every_class_in_proportion_and_no_text_twice():
    rows = [*ROWS, *ROWS[:12]]  # some texts occur twice
    task = labelled("a", rows)
    parts = [set(split.texts) for split in (task.train, task.valid, task.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert set().union(*parts) == {text for text, _ in rows}
    assert len(task.test) + len(task.valid) + len(task.train) == len(rows)
    assert task.classes == ["bad", "good"]
    drawn = dict(zip(task.test.texts, task.test.labels, strict=True))
    assert Counter(task.classes[number] for number in drawn.values()) == {"bad": 2, "good": 4}
    assert task.notes[0].startswith(f"test: {len(task.test)} rows, 10% of the rows, drawn by seed 0")
    assert labelled("a", rows) == task
    assert labelled("a", rows, split_seed=1).test != task.test


def test_given_splits_are_kept(tmp_path):
    held = [("held out", "good"), ("held, too", "bad")]
    task = labelled("a", ROWS, test=held)
    assert task.test.texts == ["held out", "held, too"] and task.test.labels == [1, 0]
    assert len(task.valid) == 6 and len(task.train) == 54
    (tmp_path / "t.csv").write_text("text,label\nheld out,good\nheld too,bad\n")
    loaded = load_task(str(write(tmp_path / "train.csv")), test=tmp_path / "t.csv", limit=10)
    assert loaded.name == "train" and loaded.test.texts == ["held out", "held too"]
    assert len(loaded.train) == 10 and loaded.notes[-1] == "train: 10 of the rows only, drawn by seed 0"


def test_a_limit_keeps_every_class_whatever_the_order_of_the_rows(tmp_path):
    """Sorted by class, the first rows have one class only."""
    counts = {"a": 120, "b": 60, "c": 12}
    rows = [(f"{label} text {number}", label) for label, count in counts.items() for number in range(count)]
    (tmp_path / "s.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))

    def drawn(limit: int, seed: int = 0) -> Labelled:
        return load_task(str(tmp_path / "s.csv"), limit=limit, split_seed=seed)

    task, whole = drawn(32), load_task(str(tmp_path / "s.csv"))
    assert [task.train.labels.count(number) for number in range(3)] == [20, 10, 2]
    assert (task.test, task.valid, task.classes) == (whole.test, whole.valid, whole.classes)
    known = dict(zip(whole.train.texts, whole.train.labels, strict=True))
    assert all(known[text] == label for text, label in zip(task.train.texts, task.train.labels, strict=True))
    assert task.train.texts == [text for text in whole.train.texts if text in set(task.train.texts)]
    assert drawn(32) == task and drawn(32, seed=1).train != task.train
    assert task.train.texts != whole.train.texts[:32]
    for limit in (3, 4, 50, len(whole.train) - 1):
        found = drawn(limit).train
        assert len(found) == limit and set(found.labels) == {0, 1, 2}
    assert drawn(len(whole.train)) == whole
    # What needs every class to be there.
    assert bool(class_weights(drawn(3).train.labels, 3).isfinite().all())
    with pytest.raises(UserError, match="--limit 2: fewer rows than there are classes, 3"):
        drawn(2)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "", "a.csv: has no rows"),
        ("a.csv", "text,label\n", "a.csv: has no rows"),
        ("a.csv", "text,label\nx,1\n,1\n", "a.csv:3: text is empty"),
        ("a.csv", "text,label\nx,1\nx\n", "a.csv:3: a row should have 2 columns"),
        ("a.csv", "text,label\nx,1,2\n", "a.csv:2: a row should have 2 columns"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}\n', "a.jsonl:2: label is empty"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: must be a JSON object"),
        ("a.parquet", "x", "not a readable parquet file"),
        ("a.xlsx", "x", r"must end in .csv, .tsv, .jsonl or .parquet"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=complaint) as refusal:
        read_rows(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_tasks_that_cannot_be_learnt_are_refused(tmp_path):
    with pytest.raises(UserError, match="class 'bad' has 3 rows, too few to draw 10% for test"):
        labelled("a", [("a", "bad"), ("b", "bad"), ("c", "bad"), *[(str(n), "good") for n in range(30)]])
    with pytest.raises(UserError, match="have 1 classes; from 2 to 1000"):
        labelled("a", [(str(n), "good") for n in range(30)])
    with pytest.raises(UserError, match="test split has the class 'new', the training rows have not"):
        labelled("a", ROWS, test=[("x", "new")])
    with pytest.raises(UserError, match=r"has no column 'x'; there are text, label"):
        read_rows(write(tmp_path / "a.csv"), "x")
    with pytest.raises(
        UserError, match=r"no such file; by name there are vader-movies, sst2, sst5, mr, subj"
    ):
        load_task("imdb")
    with pytest.raises(UserError, match=r"nowhere.csv: no such file"):
        load_task("nowhere.csv")


def hub_folder(tmp_path: Path, splits: tuple[str, ...], text: str) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    for split in splits:
        write(folder / f"{split}.jsonl", text)
    return folder


def test_the_hubs_own_splits_are_taken_and_others_drawn(tmp_path, monkeypatch):
    """`datasets` reads a folder as it reads the hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = hub_folder(tmp_path, ("train", "validation"), "sentence")
    task = load_task(f"hub:{folder}")
    assert len(task.valid) == 60 and len(task.test) == 6
    monkeypatch.setitem(
        HUB_TASKS, "sst2", tasks.HubTask(str(folder), "sentence", "label", None, "validation", "")
    )
    task = load_task("sst2")
    assert task.name == "sst2" and len(task.test) == 60 and len(task.valid) == 6 and len(task.train) == 54
    joined = tasks.HubTask(str(folder), "sentence", "label", None, None, "", ("train", "validation"))
    monkeypatch.setitem(HUB_TASKS, "mr", joined)
    task = load_task("mr")  # both splits hold the same rows here, which stay together
    assert len(task.train) + len(task.valid) + len(task.test) == 120
    assert not set(task.train.texts) & set(task.test.texts)
    with pytest.raises(UserError, match=r"has no column 'words'; there are .*sentence"):
        load_task(f"hub:{folder}", text="words")
    with pytest.raises(UserError, match="could not be loaded from the hub"):
        load_task(f"hub:{tmp_path / 'nowhere'}")


def test_ratings_of_the_packaged_task_become_classes(tmp_path, monkeypatch):
    file = tmp_path / tasks.VADER_FILE
    file.parent.mkdir()
    file.write_text("1\t2.5\tA delight.\n2\t-0.1\tDull \n3\t0.0\tA film.\n", encoding="utf-8")
    (tmp_path / tasks.VADER_ARCHIVE).parent.mkdir(parents=True)
    monkeypatch.setattr(tasks, "fetch", lambda package: tmp_path)
    monkeypatch.setattr(tasks, "extract_cached", lambda archive, pattern, key: tmp_path)
    assert tasks.vader_movies() == [("A delight.", "positive"), ("Dull", "negative")]
