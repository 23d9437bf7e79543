"""A small corpus as byte-level shards."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # where `launching` is


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory) -> Path:
    """Random sentences, the same every time."""
    from launching import write_corpus

    from spikescale.cli.main import main

    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "text")
    output = folder / "prepared"
    arguments = [
        "data",
        "prepare",
        "--source",
        str(folder / "text"),
        "--output",
        str(output),
        "--no-ray",
        "--quiet",
    ]
    assert main([*arguments, "--valid-fraction", "0.1", "--test-fraction", "0.1"]) == 0
    return output
