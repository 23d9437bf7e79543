"""A small corpus as byte-level shards."""

import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory) -> Path:
    """Random sentences, the same every time."""
    from spikescale.cli.main import main

    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    draw = random.Random(7)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "spikes",
        "over",
        "a",
        "lazy",
        "neuron",
        "while",
        "membranes",
        "leak",
    ]
    for number in range(40):
        sentences = [" ".join(draw.choices(words, k=draw.randint(4, 12))) + "." for _ in range(20)]
        (folder / "text" / f"{number:02d}.txt").write_text("\n".join(sentences), encoding="utf-8")
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
