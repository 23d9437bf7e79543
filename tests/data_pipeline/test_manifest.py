"""Damaged, missing or mismatched prepared data is refused in one line that says what is wrong."""

import json
import shutil
from pathlib import Path

import pytest

from spikescale.data_pipeline.manifest import Manifest, content_hash, load_manifest
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.errors import UserError


def complaint(folder: Path, verify: str = "full") -> str:
    with pytest.raises(UserError) as caught:
        load_manifest(folder, verify=verify)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_empty_or_unfinished_folder_says_what_to_run(tmp_path: Path, prepared_copy: Path) -> None:
    hint = "run `spikescale data prepare --output"
    assert f"no such data folder; {hint}" in complaint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert f"the folder is empty; {hint}" in complaint(tmp_path / "empty")
    (prepared_copy / "manifest.json").unlink()
    assert f"not (completely) prepared; {hint}" in complaint(prepared_copy)


@pytest.mark.parametrize("verify", ["full", "size"])
def test_a_truncated_token_file_is_refused_with_both_sizes(
    prepared: Manifest, prepared_copy: Path, verify: str
) -> None:
    path = prepared_copy / prepared.splits["train"][1].path.name
    expected = prepared.splits["train"][1].tokens * 2
    path.write_bytes(path.read_bytes()[:-7])
    assert complaint(prepared_copy, verify) == (
        f"{path}: truncated: {expected - 7} bytes, the manifest says {expected}"
    )
    path.unlink()
    assert complaint(prepared_copy, verify) == f"{path}: the shard's file is missing"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_changed_byte_is_found_by_its_checksum(
    prepared: Manifest, prepared_copy: Path, suffix: str
) -> None:
    path = (prepared_copy / prepared.splits["valid"][0].path.name).with_suffix(suffix)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert complaint(prepared_copy).startswith(f"{path}: checksum differs: sha256 ")
    load_manifest(prepared_copy, verify="size")


def test_a_tokenizer_that_is_not_the_manifests_is_refused(prepared_copy: Path) -> None:
    shutil.rmtree(prepared_copy / "tokenizer")
    assert "no such file" in complaint(prepared_copy)
    make_tokenizer("char", characters="abc").save(prepared_copy / "tokenizer")
    assert "is not the one that made the shards" in complaint(prepared_copy, "none")


def test_unknown_versions_hand_edits_and_ids_beyond_the_vocabulary_are_refused(prepared_copy: Path) -> None:
    path = prepared_copy / "manifest.json"
    described = json.loads(path.read_text())

    path.write_text(json.dumps({**described, "version": 99}))
    assert complaint(prepared_copy) == f"{path}: manifest version 99 is unknown; this program reads version 1"

    path.write_text(json.dumps({**described, "dtype": "int32"}))
    assert "was changed by hand" in complaint(prepared_copy)

    described["splits"]["train"][0]["max_id"] = 256
    described["sha256"] = content_hash(described)
    path.write_text(json.dumps(described))
    assert "hold token id 256, the tokenizer's vocabulary ends at 255" in complaint(prepared_copy)

    path.write_text("{")
    assert "not valid JSON" in complaint(prepared_copy)


def test_the_hash_identifies_the_content_and_not_the_place(prepared: Manifest, prepared_copy: Path) -> None:
    copied = load_manifest(prepared_copy)
    assert copied.sha256 == prepared.sha256 and copied.folder != prepared.folder
    assert copied.totals("train") == prepared.totals("train")
    with pytest.raises(UserError, match="split 'dev': must be one of train, valid, test"):
        copied.totals("dev")
