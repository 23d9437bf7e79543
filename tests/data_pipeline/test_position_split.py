"""Splits by position: the text in its order, cut to the byte."""

import json
from pathlib import Path

import pytest

from spikescale.cli.main import main
from spikescale.data_pipeline.manifest import Manifest, load_manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import open_source
from spikescale.data_pipeline.sources.base import ReadOptions
from spikescale.data_pipeline.sources.files import FilesSource
from spikescale.data_pipeline.split import SPLITS, SplitSettings
from spikescale.data_pipeline.stream import iterate_documents
from spikescale.data_pipeline.tokenizers import load_tokenizer
from spikescale.errors import UserError

PAGES = "".join(f"<page>{number} naïve спутник 🙂 {'x' * (number % 37)}\n" for number in range(400))


def text_of(manifest: Manifest, split: str) -> str:
    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    return "".join(tokenizer.decode(ids.tolist()) for ids in iterate_documents(manifest, split))


def by_position(paths: list[Path], output: Path, reading: dict | None = None, **split: object) -> Manifest:
    settings = PrepareSettings(ray=False, quiet=True, split=SplitSettings(by="position", **split))
    return prepare(open_source([str(path) for path in paths], **(reading or {})), output, settings)


@pytest.mark.parametrize("split_on", ["file", "(?m)^(?=<page>)"])
def test_the_three_splits_are_the_text_cut_at_90_and_95_percent(tmp_path, split_on):
    (tmp_path / "dump.txt").write_text(PAGES, encoding="utf-8")
    manifest = by_position([tmp_path / "dump.txt"], tmp_path / "out", {"split_on": split_on})
    texts = {split: text_of(manifest, split) for split in SPLITS}
    assert "".join(texts.values()) == PAGES
    size = len(PAGES.encode())
    train, valid = (len(texts[split].encode()) for split in ("train", "valid"))
    # A cut inside a character moves to the next one, at most 3 bytes on.
    assert 0 <= train - round(0.9 * size) <= 3
    assert 0 <= train + valid - round(0.95 * size) <= 3
    cut = [split for split in SPLITS[1:] if not texts[split].startswith("<page>")]
    assert cut == ["valid", "test"]


def test_positions_go_across_files_and_partitions(tmp_path):
    lines = [json.dumps({"text": f"document {number} éé"}) for number in range(500)]
    for name, part in (("a", lines[:100]), ("b", lines[100:470]), ("c", lines[470:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part), encoding="utf-8")
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    reading = {"partition_bytes": 4000}
    manifest = by_position(files, tmp_path / "out", reading, valid_fraction=0.2, test_fraction=0.1)
    whole = "".join(json.loads(line)["text"] for line in lines)
    assert "".join(text_of(manifest, split) for split in SPLITS) == whole
    sizes = [manifest.totals(split).bytes for split in SPLITS]
    assert sizes == pytest.approx(
        [0.7 * len(whole.encode()), 0.2 * len(whole.encode()), 0.1 * len(whole.encode())], abs=2
    )
    assert manifest.partitions > 4
    # The same again finds everything finished; another fraction is another request.
    assert (
        by_position(files, tmp_path / "out", reading, valid_fraction=0.2, test_fraction=0.1).sha256
        == manifest.sha256
    )
    with pytest.raises(UserError, match="split differ"):
        by_position(files, tmp_path / "out", reading)


def test_a_catalogue_entry_can_ask_for_it_and_the_user_decides(tmp_path, capsys):
    (tmp_path / "dump.txt").write_text(PAGES, encoding="utf-8")
    catalog = tmp_path / "mine.yaml"
    catalog.write_text("mine: {files: dump.txt, split_by: position, split_on: '(?m)^(?=<page>)'}")
    command = ["data", "prepare", "--source", "mine", "--catalog", str(catalog), "--no-ray", "--quiet"]
    assert main([*command, "--output", str(tmp_path / "a")]) == 0
    assert (
        text_of(load_manifest(tmp_path / "a"), "train")
        == PAGES.encode()[: round(0.9 * len(PAGES.encode()))].decode()
    )
    assert main([*command, "--output", str(tmp_path / "b"), "--split-by", "hash"]) == 0
    assert not PAGES.startswith(text_of(load_manifest(tmp_path / "b"), "train"))
    assert main([*command, "--output", str(tmp_path / "c"), "--limit-documents", "10"]) == 2
    assert "leave out --limit-documents" in capsys.readouterr().err


def test_enwik8_is_divided_by_position_and_sources_with_splits_are_not(tmp_path):
    assert open_source(["enwik8"]).split_by == "position"
    assert open_source(["wikitext-2"]).split_by is None
    catalog = tmp_path / "bad.yaml"
    catalog.write_text("bad: {hub: {path: p}, splits: {train: train}, split_by: hash}")
    with pytest.raises(UserError, match="splits and split_by exclude each other"):
        open_source(["bad"], catalogs=[catalog])
    (tmp_path / "own.txt").write_text(PAGES, encoding="utf-8")
    own = FilesSource("own", [tmp_path / "own.txt"], ReadOptions(), split="train")
    settings = PrepareSettings(ray=False, quiet=True, split=SplitSettings(by="position"))
    with pytest.raises(UserError, match="has splits of its own"):
        prepare(own, tmp_path / "out", settings)


def test_by_hash_a_request_is_what_it_was_before_there_were_positions():
    assert "by" not in SplitSettings().described()
    assert "by" not in SplitSettings(by="hash").described()
    assert SplitSettings(by="position").described()["by"] == "position"
