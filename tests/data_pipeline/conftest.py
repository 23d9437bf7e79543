"""A small corpus and its preparation, shared by the tests of the data pipeline."""

import json
from collections.abc import Callable
from pathlib import Path

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
