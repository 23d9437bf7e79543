"""Cleaning as a part of preparation: counted, repeatable to the byte, and without leaks between splits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spikescale.data_pipeline.clean import CleanSettings
from spikescale.data_pipeline.clean.record import length_bin, read_record, record_path
from spikescale.data_pipeline.clean.words import normal_digest
from spikescale.data_pipeline.manifest import Manifest, load_manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import Document, Source, open_source
from spikescale.data_pipeline.split import SplitSettings
from spikescale.data_pipeline.tokenizers import load_tokenizer
from spikescale.data_pipeline.tokens import iterate_documents
from spikescale.errors import UserError

Snapshot = Callable[[Path], dict[str, bytes]]
VOCABULARY = (
    "the be to of and that have with river mountain stone light water evening garden neighbour window house "
    "winter summer letter table morning walked looked found small great old young never always often road"
)
WORDS = VOCABULARY.split()
EVERYTHING = CleanSettings(
    fix_unicode=True,
    min_characters=20,
    languages=("en",),
    quality=("gopher",),
    adult_words="builtin",
    scrub_pii=True,
    duplicates="normalised",
    near_duplicates=True,
)


def passage(seed: int) -> str:
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(WORDS, k=12)).capitalize() + "." for _ in range(8)]
    return "\n".join(sentences)


def planted() -> list[str]:
    """200 documents, with whatever the stages are to find among them."""
    documents = []
    for number in range(160):
        text = passage(number)
        documents.append(text)
        if number % 16 == 0:
            documents.append(text.upper())  # equal words
        if number % 16 == 4:
            documents.append(text + " And a last one.")  # similar words
        if number % 32 == 8:
            documents.append(f"Short {number}")
        if number % 32 == 9:
            documents.append(
                f"Der Ausschuss tagte am {number}. Morgen und beschloss über die Brücke und den Fluss."
            )
        if number % 32 == 10:
            documents.append(f"{passage(1000 + number)} porn")
        if number % 32 == 11:
            documents.append(f"{passage(2000 + number)} Mail to a.b@example.com, naÃ¯ve {number}.")
    return documents


@pytest.fixture(scope="session")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dirty") / "dirty.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in planted()))
    return path


@pytest.fixture(scope="session")
def cleaned(tmp_path_factory: pytest.TempPathFactory, dirty: Path) -> Manifest:
    return prepare(source_of(dirty), tmp_path_factory.mktemp("cleaned") / "data", serial(EVERYTHING))


def source_of(path: Path) -> Source:
    return open_source([str(path)], partition_bytes=path.stat().st_size // 5 + 1)


def serial(clean: CleanSettings, **settings: object) -> PrepareSettings:
    return PrepareSettings(ray=False, quiet=True, clean=clean, **settings)  # type: ignore[arg-type]


def decoded(manifest: Manifest, split: str) -> list[str]:
    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    return [tokenizer.decode(ids[:-1].tolist()) for ids in iterate_documents(manifest, split)]


def everything_in(manifest: Manifest) -> list[str]:
    return [text for split in manifest.splits for text in decoded(manifest, split)]


def records_of(manifest: Manifest) -> list[dict]:  # type: ignore[type-arg]
    found = [read_record(record_path(manifest.folder, number)) for number in range(manifest.partitions)]
    assert None not in found
    return found  # type: ignore[return-value]


def test_without_cleaning_nothing_of_it_is_in_the_folder(prepared: Manifest) -> None:
    assert not (prepared.folder / "clean").exists()
    assert "clean" not in json.loads((prepared.folder / "request.json").read_text())
    for sidecar in prepared.folder.glob("train-*.json"):
        assert "record_sha256" not in json.loads(sidecar.read_text())


def test_each_stage_drops_what_was_planted_for_it(cleaned: Manifest) -> None:
    dropped: dict[str, int] = {}
    changed: dict[str, int] = {}
    for record in records_of(cleaned):
        for stage in record["stages"]:
            changed[stage["name"]] = changed.get(stage["name"], 0) + stage["changed"]
            for rule, counts in stage["dropped"].items():
                dropped[rule] = dropped.get(rule, 0) + counts["documents"]
    assert dropped == {
        "length.min_characters": 5,
        "language.other": 5,
        "adult": 5,
        "duplicates.exact": 10,
        "duplicates.near": 10,
    }
    assert changed["unicode"] == changed["pii"] == 5
    texts = everything_in(cleaned)
    assert len(texts) == 165 and sum("naïve" in text and "[EMAIL]" in text for text in texts) == 5
    assert sorted(text for text in texts if "[EMAIL]" not in text and "last one" not in text) == sorted(
        passage(number) for number in range(160) if passage(number) in texts
    )


def test_what_goes_into_a_stage_comes_out_or_is_dropped_with_a_sample(cleaned: Manifest, dirty: Path) -> None:
    documents = characters = 0
    for number, record in enumerate(records_of(cleaned)):
        stages = record["stages"]
        assert [stage["name"] for stage in stages] == [
            *("unicode", "length", "language", "gopher", "adult", "pii", "duplicates")
        ]
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            gone = [
                sum(rule[what] for rule in stage["dropped"].values()) for what in ("documents", "characters")
            ]
            assert stage["documents_in"] == stage["documents_out"] + gone[0]
            if not stage["changed"]:
                assert stage["characters_in"] == stage["characters_out"] + gone[1]
            if following:
                assert following["documents_in"] == stage["documents_out"]
                assert following["characters_in"] == stage["characters_out"]
            for rule, counts in stage["dropped"].items():
                assert len(record["samples"][rule]) == min(3, counts["documents"])
        shards = [shard for split in cleaned.splits.values() for shard in split if shard.number == number]
        assert stages[-1]["documents_out"] == sum(shard.documents for shard in shards)
        assert stages[-1]["characters_out"] == sum(shard.characters for shard in shards)
        assert sum(record["lengths"]["after"].values()) == stages[-1]["documents_out"]
        documents += stages[0]["documents_in"]
        characters += stages[0]["characters_in"]
        before = {int(key): count for key, count in record["lengths"]["before"].items()}
        assert sum(before.values()) == stages[0]["documents_in"]
    texts = planted()
    assert documents == len(texts) and characters == sum(map(len, texts))
    assert length_bin(len(texts[0])) in before
    clusters = json.loads((cleaned.folder / "clean" / "duplicates.json").read_text())
    assert clusters["clusters"] == 20 and clusters["sizes"] == {"2": 20}


class OwnSplits:
    """A source with splits of its own, whose documents are in several of them."""

    name = "own"

    def __init__(self, parts: list[tuple[str, list[str]]]) -> None:
        self._parts = parts

    def identity(self) -> dict[str, object]:
        return {}

    def partitions(self) -> list["OwnPart"]:
        return [OwnPart(number, split, texts) for number, (split, texts) in enumerate(self._parts)]


class OwnPart:
    size_bytes = 0
    reads = 0

    def __init__(self, number: int, split: str, texts: list[str]) -> None:
        self.label, self.split, self._texts = f"{split} {number}", split, texts

    def documents(self) -> Iterator[Document]:
        OwnPart.reads += 1
        return (Document(text, "somewhere") for text in self._texts)


@pytest.mark.parametrize("unit", ["document", "chunk"])
def test_no_document_stands_in_two_splits(tmp_path: Path, dirty: Path, unit: str) -> None:
    """By a hash of its words: of sources with their own splits, and where case changes a document's hash."""
    settings = SplitSettings(valid_fraction=0.3, test_fraction=0.3, unit=unit, chunk_characters=150)
    texts = [passage(number) for number in range(30)]
    own = OwnSplits(
        [
            ("train", texts[:20]),
            ("train", [text.lower() for text in texts[:25]]),
            ("valid", texts[10:22]),
            ("test", [text.replace(".", "!") for text in texts[15:30]]),
        ]
    )
    for name, source in (("own", own), ("hashed", source_of(dirty))):
        leaking: list[bool] = []
        for duplicates in ("off", "normalised"):
            clean = CleanSettings(duplicates=duplicates, min_characters=1)
            output = tmp_path / f"{name}-{duplicates}"
            manifest = prepare(source, output, serial(clean, split=settings))  # type: ignore[arg-type]
            hashes = {
                split: {normal_digest(text) for text in decoded(manifest, split)} for split in manifest.splits
            }
            pairs = (("train", "valid"), ("train", "test"), ("valid", "test"))
            leaking.append(any(hashes[one] & hashes[two] for one, two in pairs))
            if duplicates == "normalised":
                assert sum(map(len, hashes.values())) == len(everything_in(manifest))
        assert leaking == [True, False]
        assert hashes["train"] and hashes["valid"] and hashes["test"]


def test_the_first_pass_is_not_repeated_and_a_damaged_file_is_made_again(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = OwnSplits([("train", [passage(number) for number in range(k, k + 9)]) for k in range(4)])
    settings = serial(CleanSettings(duplicates="exact"))
    expected = tmp_path / "undisturbed"
    prepare(source, expected, settings)  # type: ignore[arg-type]
    from spikescale.data_pipeline import prepare as module

    def fails(*arguments: object) -> None:
        raise UserError("stopped here")

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_require_documents", fails)
        with pytest.raises(UserError, match="stopped here"):
            prepare(source, output, settings)  # type: ignore[arg-type]
    work = output / "clean" / "work"
    (work / "00002.npy").write_bytes(b"torn")
    (output / "train-00001.json").unlink()
    (output / "clean" / "record-00003.json").write_text("{}")
    OwnPart.reads = 0
    prepare(source, output, settings)  # type: ignore[arg-type]
    assert OwnPart.reads == 1
    assert snapshot(output) == snapshot(expected) and not work.exists()
    prepare(source, output, settings)  # type: ignore[arg-type]
    assert OwnPart.reads == 1
    (output / "clean" / "record-00001.json").unlink()
    prepare(source, output, settings)  # type: ignore[arg-type]
    assert OwnPart.reads == 5 and snapshot(output) == snapshot(expected)


def test_settings_are_part_of_the_request_and_contents_count_not_paths(
    tmp_path: Path, dirty: Path, snapshot: Snapshot
) -> None:
    evaluation = tmp_path / "evaluation.txt"
    evaluation.write_text(passage(3))
    clean = CleanSettings(evaluation_sets=(str(evaluation),))
    output = tmp_path / "out"
    first = prepare(source_of(dirty), output, serial(clean))
    texts = everything_in(first)
    assert passage(3) not in texts and passage(4) in texts
    before = snapshot(output)
    with pytest.raises(UserError, match=r"prepared otherwise \(clean differ\)"):
        prepare(source_of(dirty), output, serial(CleanSettings()))
    (tmp_path / "moved").mkdir()
    moved = evaluation.rename(tmp_path / "moved" / "evaluation.txt")
    clean = CleanSettings(evaluation_sets=(str(moved),))
    prepare(source_of(dirty), output, serial(clean))
    assert snapshot(output) == before
    moved.write_text(passage(4))
    with pytest.raises(UserError, match=r"prepared otherwise \(clean differ\)"):
        prepare(source_of(dirty), output, serial(clean))
    manifest = prepare(source_of(dirty), output, serial(clean, overwrite=True))
    assert passage(4) not in everything_in(manifest) and passage(3) in everything_in(manifest)
    folder = CleanSettings(evaluation_sets=(f"{output}:test",))
    against = prepare(source_of(dirty), tmp_path / "against", serial(folder))
    tests = {text for text in decoded(manifest, "test") if len(text) > 20}  # of 8 words or more
    assert tests and not tests & set(everything_in(against))


def test_the_tokenizer_learns_from_what_is_left_and_unknown_tokens_are_limited(tmp_path: Path) -> None:
    texts = [f"{passage(number)} ☃" for number in range(60)] + ["♜" * 9] * 3
    parts = [
        ("train", texts),
        ("test", [passage(61), passage(62) + "☂", "☂☂" + "the" * 66, "☂☂" + "the" * 65]),
    ]
    source = OwnSplits(parts)
    clean = CleanSettings(min_characters=10, max_unknown_share=0.01)
    manifest = prepare(source, tmp_path / "out", serial(clean, tokenizer="char"))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    assert tokenizer.unk_id is not None
    assert tokenizer.encode("☃♜")[1] == tokenizer.unk_id != tokenizer.encode("☃♜")[0]
    assert manifest.totals("test").documents == 3
    record = records_of(manifest)[1]
    assert record["stages"][-1]["dropped"] == {"unknown.share": {"documents": 1, "characters": 197}}
    with pytest.raises(UserError, match="tokenizer byte has no unknown token"):
        prepare(source, tmp_path / "byte", serial(clean))  # type: ignore[arg-type]


def test_what_is_known_of_a_document_goes_through_cleaning(tmp_path: Path) -> None:
    class Known(OwnPart):
        def documents(self) -> Iterator[Document]:
            for number, text in enumerate(self._texts):
                yield Document(text, "somewhere", (("half", str(number % 2)),))

    class Source(OwnSplits):
        def partitions(self) -> list[OwnPart]:
            return [Known(0, "train", [passage(number) for number in range(20)] + ["short", passage(0)])]

    settings = serial(
        CleanSettings(min_characters=10, duplicates="exact"), condition_on=("half",), condition_dropout=0.0
    )
    manifest = prepare(Source([]), tmp_path / "out", settings)  # type: ignore[arg-type]
    firsts = [int(ids[0]) for ids in iterate_documents(manifest, "train")]
    assert firsts == [256 + number % 2 for number in range(20)]


@pytest.mark.parametrize("unit", ["document", "chunk"])
@pytest.mark.parametrize("clean", [CleanSettings(), CleanSettings(min_characters=10)])
def test_a_bad_record_of_any_source_is_refused_and_not_lost(
    tmp_path: Path, unit: str, clean: CleanSettings
) -> None:
    class Faulty(OwnPart):
        def documents(self) -> Iterator[Document]:
            yield Document(passage(0), "line 1")
            yield Document("", "line 2", fault="not valid")

    class Source(OwnSplits):
        def partitions(self) -> list[OwnPart]:
            return [Faulty(0, "train", [])]

    settings = serial(clean, split=SplitSettings(unit=unit))
    with pytest.raises(UserError, match="line 2: not valid"):
        prepare(Source([]), tmp_path / "out", settings)  # type: ignore[arg-type]


def test_when_nothing_is_left_the_rules_are_named(tmp_path: Path, dirty: Path) -> None:
    with pytest.raises(
        UserError, match=r"cleaning left none of 200 documents: length.min_characters dropped 200"
    ):
        prepare(source_of(dirty), tmp_path / "out", serial(CleanSettings(min_characters=10**6)))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("during", ["clean/work/.tmp-*-00003.jsonl.zst", ".tmp-*-train-00002.bin"])
def test_a_killed_cleaning_run_again_gives_the_same_bytes(
    tmp_path: Path, dirty: Path, cleaned: Manifest, snapshot: Snapshot, during: str
) -> None:
    """Killed in the first pass, and while shards are written."""
    output = tmp_path / "out"
    script = (
        "import time; from pathlib import Path\n"
        "from spikescale.data_pipeline import placed, tasks\n"
        "from spikescale.data_pipeline.clean import CleanSettings, work\n"
        "from spikescale.data_pipeline.prepare import PrepareSettings, prepare\n"
        "from spikescale.data_pipeline.sources import open_source\n"
        "placed.BATCH_DOCUMENTS = 5\n"
        "write, clean = tasks._write_batch, work._Cleaned._clean\n"
        "tasks._write_batch = lambda *a: (write(*a), time.sleep(0.05))\n"
        "work._Cleaned._clean = lambda *a: (time.sleep(0.005), clean(*a))[1]\n"
        f"prepare(open_source([{str(dirty)!r}], partition_bytes={dirty.stat().st_size // 5 + 1}), "
        f"Path({str(output)!r}), PrepareSettings(ray=False, quiet=True, clean={EVERYTHING!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 300
    while not list(output.glob(during)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (output / "clean" / "work" / "00002.json").exists() and not (output / "manifest.json").exists()
    kept = (output / "clean" / "work" / "00002.json").stat().st_mtime_ns
    seen: list[int] = []
    from spikescale.data_pipeline.clean import work

    original = work.CleanTask.run

    def run(task: work.CleanTask, report: work.Report) -> None:
        original(task, report)
        seen.append((output / "clean" / "work" / "00002.json").stat().st_mtime_ns)

    work.CleanTask.run = run  # type: ignore[method-assign]
    try:
        prepare(source_of(dirty), output, serial(EVERYTHING))
    finally:
        work.CleanTask.run = original  # type: ignore[method-assign]
    assert seen == [kept] * 5
    assert snapshot(output) == snapshot(cleaned.folder)


class KillOnce:
    """A partition whose first reader is killed by the system in the middle."""

    split = None

    def __init__(self, inner: object, flag: Path) -> None:
        self._inner = inner
        self._flag = flag
        self.label, self.size_bytes = inner.label, inner.size_bytes  # type: ignore[attr-defined]

    def documents(self) -> Iterator[Document]:
        for number, document in enumerate(self._inner.documents()):  # type: ignore[attr-defined]
            if number == 10 and not self._flag.exists():
                self._flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield document


@pytest.mark.slow
@pytest.mark.distributed
def test_ray_workers_one_of_them_killed_give_the_bytes_of_one_process(
    tmp_path: Path, dirty: Path, cleaned: Manifest, snapshot: Snapshot
) -> None:
    import ray

    # The workers cannot import a test module: its classes travel whole.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    source = source_of(dirty)
    inner = source.partitions()
    flag = tmp_path / "killed"
    inner[1] = KillOnce(inner[1], flag)  # type: ignore[call-overload]
    source.partitions = lambda: inner  # type: ignore[method-assign]
    try:
        prepare(source, tmp_path / "out", PrepareSettings(workers=2, quiet=True, clean=EVERYTHING))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert flag.exists()
    assert snapshot(tmp_path / "out") == snapshot(cleaned.folder)
    load_manifest(tmp_path / "out")
