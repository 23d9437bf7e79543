"""A small corpus and its preparation, shared by the tests of the data pipeline."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import open_source

VOCABULARY = (
    "the quick brown fox jumps over a lazy dog naïve café 你好 спутник 🙂 and then some more words",
    "scarcely any evening passes without quarrels between neighbours whose gardens adjoin",
)
WORDS = " ".join(VOCABULARY).split()


def make_text(number: int) -> str:
    """A document that differs from every other, of 3 to 62 words."""
    words = [WORDS[(number * 7 + step * step) % len(WORDS)] for step in range(3 + number * 13 % 60)]
    return f"Document {number}: " + " ".join(words) + ".\nIts second line."


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [make_text(number) for number in range(400)]


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, jsonl: Path) -> Manifest:
    """Byte tokens in about ten partitions, so that windows of shards can be told apart."""
    source = open_source([str(jsonl)], partition_bytes=jsonl.stat().st_size // 10 + 1)
    folder = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(source, folder, PrepareSettings(ray=False, quiet=True))


@pytest.fixture
def prepared_copy(tmp_path: Path, prepared: Manifest) -> Path:
    """The prepared folder, to damage."""
    import shutil

    return Path(shutil.copytree(prepared.folder, tmp_path / "copy"))


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Names and contents of all files under a folder."""

    def take(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return take


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[Any]:
    """An S3 server behind a proxy that can be told to fail."""
    from s3_server import Proxy, moto_server

    with moto_server() as address:
        proxy = Proxy(address)
        yield proxy
        proxy.close()


@pytest.fixture
def s3(s3_proxy: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The proxy, found by the environment alone; its `bucket` is a new one."""
    from spikescale.data_pipeline import storage

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.001)
    s3_proxy.plan = lambda method, path, headers: None
    filesystem, _ = storage.open_filesystem("s3://any")
    s3_proxy.bucket = f"bucket-{abs(hash(request.node.nodeid)):x}"
    filesystem.mkdir(s3_proxy.bucket)
    s3_proxy.filesystem = filesystem
    s3_proxy.log.clear()
    s3_proxy.done.clear()
    yield s3_proxy
    s3_proxy.plan = lambda method, path, headers: None
