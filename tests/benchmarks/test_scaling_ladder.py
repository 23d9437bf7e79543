"""The ladder spans what it says, and its largest size waits until its prediction is committed."""

import importlib
import subprocess
from pathlib import Path

import pytest

from spikescale.config import ModelConfig
from spikescale.scaling.ladder import Size, parse_numbers, parse_shapes


@pytest.fixture
def ladder(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("scaling_ladder")


def test_sizes_span_a_factor_of_thirty_and_end_with_the_predicted_one(ladder):
    for *_, sizes, tokens, _ in ladder.LADDERS.values():
        shapes = parse_shapes(sizes)
        bodies = [Size.of(shape.model(ModelConfig(vocab_size=257))).non_embedding for shape in shapes]
        assert len(shapes) >= 5
        assert bodies == sorted(bodies)
        assert bodies[-1] / bodies[0] > 30
        assert str(shapes[-1]) == ladder.LARGEST
        assert len(parse_numbers(tokens, "tokens")) >= 2


def test_a_prediction_counts_once_it_is_committed_and_unchanged(ladder, tmp_path):
    def git(*words):
        settings = ["-c", "user.name=n", "-c", "user.email=e@x"]
        subprocess.run(["git", "-C", str(tmp_path), *settings, *words], check=True, capture_output=True)

    file = tmp_path / "prediction.json"
    file.write_text("{}")
    assert not ladder._committed(file)  # no repository
    git("init")
    assert not ladder._committed(file)
    git("add", "prediction.json")
    assert not ladder._committed(file)
    git("commit", "-m", "before the largest run")
    assert ladder._committed(file)
    file.write_text('{"better": "afterwards"}')
    assert not ladder._committed(file)
