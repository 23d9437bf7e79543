"""A small prepared data set and a run file for it."""

import json
from pathlib import Path

import pytest
from launching import TINY, write_corpus


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory) -> Path:
    """The corpus as byte-level shards."""
    from spikescale.cli.main import main

    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "text")
    output = folder / "prepared"
    words = ["data", "prepare", "--source", str(folder / "text"), "--tokenizer", "byte"]
    words += ["--output", str(output), "--no-ray", "--valid-fraction", "0.1", "--test-fraction", "0.1"]
    assert main(words) == 0
    return output


@pytest.fixture
def run_file(tmp_path, prepared_data) -> Path:
    """A complete run of seconds, with its output in the test's own folder."""
    path = tmp_path / "run.yaml"
    content = {"name": "run", "output": str(tmp_path / "runs"), "data": {"path": str(prepared_data)}, **TINY}
    path.write_text(json.dumps(content))
    return path
