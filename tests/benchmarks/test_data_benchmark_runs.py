"""The benchmark of data prepares and reads, end to end, on a corpus of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "data.py"


def run(tmp_path: Path, *words: str) -> dict:
    output = tmp_path / "data.json"
    command = [sys.executable, str(BENCHMARK), "--output", str(output), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_rows_that_write_the_same_tokens_are_compared(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"document {number} " + "word " * (number % 50)}) for number in range(400)]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = ["spikescale, one process", "datasets.map, 2 processes", "Megatron style, 2 processes"]
    words = [
        "--parts",
        "preparing",
        "--sources",
        str(texts),
        "--tokenizer",
        "byte",
        "--repeats",
        "1",
        "--copies",
        "2",
    ]
    found = run(tmp_path, *words, "--rows", *rows)["preparing"]
    assert [row["name"] for row in found] == ["plain loop (the limit)", *rows]
    expected = 2 * sum(len(json.loads(line)["text"]) + 1 for line in lines)
    assert {row["tokens"] for row in found} == {expected}
    assert all(row["cpu_seconds"] > 0 for row in found)


@pytest.mark.slow
def test_reading_reports_rates_start_and_memory(tmp_path: Path) -> None:
    words = ["--parts", "reading", "--tokens", "300000", "--steps", "3"]
    found = run(tmp_path, *words, "--folder", str(tmp_path / "set"))["reading"]
    assert len(found["rates"]) == len(found["memory"]) == 20 and min(found["rates"]) > 0
    assert 0 < found["start"] < 60 and found["limit"] > 0
    # The data set that was kept is used again.
    assert run(tmp_path, *words, "--folder", str(tmp_path / "set"))["reading"]["tokens"] == 300000
