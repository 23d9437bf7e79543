"""Training on a mixture whose sources are made meanwhile, beside one that was prepared before."""

import contextlib
import fcntl
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from launching import TINY, launch

from spikescale.config import RunConfig, load_config
from spikescale.data_pipeline import pools
from spikescale.data_pipeline.live import Head, LiveDataset
from spikescale.data_pipeline.manifest import TokenizerInfo, load_manifest
from spikescale.errors import UserError
from spikescale.tracking.metrics_file import read_metrics
from spikescale.training.bootstrap import Process
from spikescale.training.dataset import Dataset, Part
from spikescale.training.pretrain import main
from spikescale.training.production import Production, producer_jobs
from spikescale.training.waiting import DataWaits

SAME = ("loss", "gradient_norm", "tokens", "source_losses", "valid_loss", "valid_source_losses")
TEXT_MIB, CODE_MIB = 0.0025, 0.0005  # 35 shards and 16


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of words and, fewer, of digits; what they become, and `books`, prepared."""
    folder = tmp_path_factory.mktemp("corpora")
    generator = random.Random(7)
    words = ["the", "quick", "neuron", "spikes", "over", "lazy", "membranes", "while", "they", "leak"]
    for number in range(240):
        write(folder / "text", number, " ".join(generator.choices(words, k=60)))
        write(folder / "verse", number, "\n".join(generator.choices(words, k=30)))
    for number in range(120):
        write(folder / "code", number, " ".join(str(number * step) for step in range(17)))
    for name, output, mib in (
        ("text", "finished-text", TEXT_MIB),
        ("code", "finished-code", CODE_MIB),
        ("verse", "books", TEXT_MIB),
    ):
        prepare(folder / name, folder / output, mib)
    return folder


def write(folder: Path, number: int, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{number:03d}.txt").write_text(text)


def prepare(source: Path, output: Path, mib: float) -> None:
    from spikescale.cli.main import main

    words = ["data", "prepare", "--source", str(source), "--tokenizer", "byte", "--no-ray", "--quiet"]
    words += ["--valid-fraction", "0.1", "--test-fraction", "0.1"]
    assert main([*words, "--partition-mib", str(mib), "--output", str(output)]) == 0


def streamed(corpora: Path, folder: Path, name: str, weight: float, mib: float, **stream: object) -> dict:
    settings = {"source": [str(corpora / name)], "partition_mib": mib, "ray": "none", **stream}
    settings |= {"valid_fraction": 0.1, "test_fraction": 0.1}
    return {"path": str(folder / name), "name": name, "weight": weight, "stream": settings}


def mixture(corpora: Path, folder: Path) -> list[dict]:
    return [
        streamed(corpora, folder, "text", 4, TEXT_MIB, look_ahead_shards=1),
        {"path": str(corpora / "books"), "weight": 2},
        streamed(corpora, folder, "code", 4, CODE_MIB, look_ahead_shards=2),
    ]


def finished(sources: list[dict], paths: dict[str, Path]) -> list[dict]:
    """The same mixture of data sets that have been made."""
    return [
        {"name": source["name"], "weight": source["weight"], "path": str(paths[source["name"]])}
        if "stream" in source
        else source
        for source in sources
    ]


def run_file(folder: Path, name: str, sources: list[dict], mode: str = "streaming", **train: object) -> Path:
    data = {"sources": sources, "mode": mode, "shuffle_window": 3}
    content = {"name": name, "output": str(folder / "runs"), **TINY, "data": data}
    settings = {"steps": 24, "batch_size": 32, "save_every": 8, "evaluate_every": 6, "evaluate_tokens": 500}
    content["train"] = {**TINY["train"], **settings, **train}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))
    return path


def curve(folder: Path, name: str) -> list[dict]:
    records = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [{key: record[key] for key in SAME if key in record} for record in records]


@contextlib.contextmanager
def producers_killed(folder: Path) -> Iterator[list[int]]:
    """Kill the producer that writes to `folder`, once, as soon as it has made half a dozen shards."""
    killed: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02) and not killed:
            if len(list(folder.glob("test-*.json"))) < 6:
                continue
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process().children(recursive=True):
                    if "spikescale.data_pipeline.producer" in child.cmdline() and writes_to(child, folder):
                        child.kill()
                        killed.append(child.pid)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def writes_to(producer: psutil.Process, folder: Path) -> bool:
    return any(Path(file.path).parent == folder for file in producer.open_files())


def nobody_writes(folder: Path) -> bool:
    """Whether no producer holds the folder any more, within the time that its end may take."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(100):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.1)
        return False
    finally:
        os.close(descriptor)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_curve_is_that_of_the_finished_mixture_to_the_bit(tmp_path: Path, corpora: Path) -> None:
    """On two ranks: live, live again after a kill, then on the finished data; over an epoch of code."""
    live = mixture(corpora, tmp_path)
    whole = finished(live, {name: corpora / f"finished-{name}" for name in ("text", "code")})
    launch(["--config", str(run_file(tmp_path, "finished", whole, "prepared"))], "torchrun", 2)
    expected = curve(tmp_path, "finished")

    words = ["--config", str(run_file(tmp_path, "live", live))]
    with producers_killed(tmp_path / "code") as killed:
        first = launch([*words, "faults.inject=kill@10"], "torchrun", 2, check=False)
    assert first.returncode != 0 and len(killed) == 1
    assert "mixture by tokens: text 40.00%, books 20.00%, code 40.00%" in first.stdout
    assert "planned, text 35 shards, code 16 shards that are made while they are read" in first.stdout
    second = launch([*words, "faults.inject=kill@19:rank1"], "torchrun", 2, check=False)
    assert "resumed at step 8" in second.stdout
    assert nobody_writes(tmp_path / "text") and not (tmp_path / "text" / "manifest.json").exists()

    for name, mib in (("text", TEXT_MIB), ("code", CODE_MIB)):
        prepare(corpora / name, tmp_path / name, mib)
    rest = finished(live, {name: tmp_path / name for name in ("text", "code")})
    third = launch(["--config", str(run_file(tmp_path, "live", rest, "prepared"))], "torchrun", 2)
    assert "resumed at step 16" in third.stdout
    assert curve(tmp_path, "live") == expected
    assert [len(record["valid_source_losses"]) for record in expected if "valid_loss" in record] == [3] * 6
    tokens = load_manifest(corpora / "finished-code").totals("train").tokens
    assert tokens < 18 * 32 * 32 * 0.4  # live, into its second epoch


@pytest.mark.slow
@pytest.mark.distributed
def test_bad_text_in_one_source_ends_all_ranks_and_producers(tmp_path: Path, corpora: Path) -> None:
    lines = [json.dumps({"text": f"document {number} " + "word " * 60}) for number in range(200)]
    lines[180] = "{not json"
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    sources = mixture(corpora, tmp_path / "live")
    sources[2] = streamed(tmp_path, tmp_path / "live", "bad.jsonl", 3, TEXT_MIB, look_ahead_shards=1)
    path = run_file(tmp_path, "bad", sources, steps=400, save_every=4, evaluate_every=0, log_every=4)
    done = launch(["--config", str(path)], "torchrun", 2, check=False)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "bad.jsonl, line 181" in line and "not valid JSON" in line and "the run goes on from step" in line
    assert list((tmp_path / "runs" / "bad" / "checkpoints").glob("step-*"))
    assert nobody_writes(tmp_path / "live" / "text") and nobody_writes(tmp_path / "live" / "bad.jsonl")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_end_evaluates_what_has_been_made(tmp_path: Path, corpora: Path) -> None:
    """All of code, which validation needs as a whole; of text what validation had."""
    sources = [
        streamed(corpora, tmp_path, "text", 1, TEXT_MIB, look_ahead_shards=1),
        streamed(corpora, tmp_path, "code", 99, CODE_MIB),
    ]
    path = run_file(tmp_path, "partly", sources, steps=4, evaluate_tokens=5000)
    done = launch(["--config", str(path)])
    assert "the data are not all made (text): the shards that validation had" in done.stdout
    splits = json.loads((tmp_path / "runs" / "partly" / "result.json").read_text())["splits"]
    code, text = (load_manifest(corpora / f"finished-{name}") for name in ("code", "text"))
    for split in ("valid", "test"):
        assert splits[f"{split}: code"]["tokens"] == code.totals(split).tokens
    assert 0 < splits["valid: text"]["tokens"] < text.totals("valid").tokens
    # The next run finds code made, and goes on with text.
    data = Dataset.open(load_config(path).data, {}, {}, ["code"], "size")
    assert [part.name for part in data.live] == ["text"]
    assert [part.manifest.complete for part in data.parts] == [False, True]


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.slow
def test_other_tokenizers_are_refused_before_the_first_step(
    tmp_path: Path, corpora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [streamed(corpora, tmp_path, name, 1, TEXT_MIB, tokenizer="char") for name in ("text", "code")]
    said = refused(capsys, ["--config", str(run_file(tmp_path, "other", sources))])
    assert "code was prepared with tokenizer char" in said and "each has learnt from its own text" in said
    assert not (tmp_path / "runs" / "other" / "checkpoints").exists()
    assert nobody_writes(tmp_path / "text") and nobody_writes(tmp_path / "code")


def test_prepared_sources_are_looked_at_before_anything_is_made(
    tmp_path: Path, corpora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = mixture(corpora, tmp_path)
    sources[1]["path"] = str(tmp_path / "nowhere")
    assert "nowhere: no such data folder" in refused(
        capsys, ["--config", str(run_file(tmp_path, "absent", sources))]
    )
    assert not (tmp_path / "text").exists()
    sources = mixture(corpora, tmp_path)
    sources[2]["stream"]["clean"] = {"unicorns": True}
    said = refused(capsys, ["--config", str(run_file(tmp_path, "clean", sources))])
    assert "data.sources: code: stream.clean: unknown key unicorns" in said
    assert not (tmp_path / "text").exists()


def settings(sources: list[dict], **train: object) -> RunConfig:
    data = {"mode": "streaming", "sources": sources}
    return RunConfig.model_validate_json(json.dumps({"data": data, "train": train}))


def test_a_producer_is_told_what_its_own_stream_needs(corpora: Path) -> None:
    cluster = {"source": ["x"], "ray": "cluster", "ray_address": "auto"}
    sources = [
        {"path": "a", "weight": 5, "stream": {**cluster, "workers": 3, "look_ahead_shards": 7}},
        {"path": "b", "weight": 3, "stream": {**cluster, "workers": 2, "tokenizer": "gpt2"}},
        {"path": "c", "weight": 2, "stream": {"source": ["y"], "workers": 4, "valid_fraction": 0.0}},
        {"path": str(corpora / "books"), "weight": 2},
    ]
    books = load_manifest(corpora / "books")
    jobs = producer_jobs(settings(sources, evaluate_tokens=999), {"books": books})
    assert list(jobs) == ["a", "b", "c"]
    assert [Path(job.output).name for job in jobs.values()] == ["a", "b", "c"]
    # Validation reads shares of 5, 3 and 2 (books) of ten: c has none. c makes no shard for it at all.
    assert [job.valid_tokens for job in jobs.values()] == [500, 300, 999]
    assert [job.ahead_shards for job in jobs.values()] == [7, 16, 16]
    told = [job.settings for job in jobs.values()]
    assert [job["tokenizer"] for job in told] == ["byte", "gpt2", "byte"]
    assert [(job["workers"], job["ray_others"]) for job in told] == [(3, 2), (2, 3), (4, 0)]


def test_streams_share_the_cores_of_one_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever took all of them would hold back with them while the others wait for a core."""
    cores = {"CPU": 5.0}
    monkeypatch.setattr(pools, "ray_running", lambda *_: contextlib.nullcontext(cores))

    def taken(workers: int, others: int) -> int:
        with pools.ray_pool(workers, "auto", others) as pool:
            return pool._workers

    assert [taken(8, 0), taken(3, 2), taken(6, 4), taken(4, 6)] == [5, 3, 3, 2]
    with pytest.raises(UserError, match="too few cores for 12 workers"):
        taken(2, 10)


class Producer(SimpleNamespace):
    """A stand-in for a producer's process."""

    def wait_for_head(self, seconds: float) -> bool:
        if self.failure:
            raise UserError(self.failure)
        return self.complete

    def slowest(self) -> str:
        self.asked += 1
        return f"{self.stage} is slowest"


def test_a_failure_is_not_hidden_by_a_source_that_is_slow() -> None:
    production = Production()
    slow = Producer(failure=None, complete=False)
    production.producers = {"slow": slow, "done": Producer(failure=None, complete=True)}  # type: ignore
    assert not production.wait_for_heads(0.1) and production.made() == ["done"]
    production.producers["bad"] = Producer(failure="b.txt, line 3", complete=False)  # type: ignore
    with pytest.raises(UserError, match=r"b.txt, line 3"):
        production.wait_for_heads(60)
    del production.producers["bad"]
    slow.complete = True
    assert production.wait_for_heads(0) and production.made() == ["slow", "done"]


@pytest.mark.parametrize("mixed", [True, False])
def test_a_wait_names_the_source_and_its_slowest_stage(tmp_path: Path, mixed: bool) -> None:
    parts = []
    for name, stage in (("text", "reading"), ("code", "tokenising"))[: 1 + mixed]:
        (tmp_path / name).mkdir()
        Head("r", name, 20, "uint16", TokenizerInfo("byte", 256, 255, "t"), 0).write(tmp_path / name)
        producer: Any = Producer(stage=stage, asked=0, done=3, partitions=20)
        parts.append(Part(name, LiveDataset(tmp_path / name), 1.0, producer))
    waits = DataWaits(Dataset(tuple(parts)), Process(0, 1, 0, 1, torch.device("cpu")))
    assert waits.look(0.005) == (0.005, "")
    live = parts[-1].manifest
    assert isinstance(live, LiveDataset)
    live.waited += 2.5
    live.waiting = True
    parts[0].manifest.waited += 0.5
    _, told = waits.look(0.12)
    whose = "for data, most for code: 3" if mixed else "for data: 3"
    stage = "tokenising" if mixed else "reading"
    assert told == f"12.0% of the time went to waiting {whose} of 20 shards are made; {stage} is slowest"
    assert waits.waited_for() == (" (code)" if mixed else "")
    _, told = waits.look(0.12)  # since then nobody waited for shards
    assert told.endswith("none of it for data that are being made") == mixed
    assert all(part.producer.asked == 3 for part in parts)
