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


def test_sizes_span_a_factor_of_thirty_by_both_counts_and_end_with_the_predicted_one(ladder):
    for name, symbols in (("byte", 256), ("bpe", 2048)):
        rungs = ladder.LADDERS[name]
        shapes = parse_shapes(rungs.sizes)
        sizes = [Size.of(shape.model(ModelConfig(vocab_size=symbols))) for shape in shapes]
        assert len(shapes) >= 5
        for counts in ([size.non_embedding for size in sizes], [size.total for size in sizes]):
            assert counts == sorted(counts)
            assert counts[-1] / counts[0] > 30
        assert str(shapes[-1]) == rungs.largest
        assert len(parse_numbers(rungs.tokens, "tokens")) >= 4


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
