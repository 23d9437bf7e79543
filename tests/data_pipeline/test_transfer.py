"""Prepared data to and from an S3 server on loopback that fails: whole and right, or not there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from spikescale.cli.main import main
from spikescale.data_pipeline.manifest import Manifest, load_manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.remote import localise
from spikescale.data_pipeline.sources import open_source
from spikescale.data_pipeline.transfer import CHECKSUMS, pull, push
from spikescale.errors import UserError

Snapshot = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, jsonl: Path) -> Manifest:
    """Three partitions: nine shards."""
    source = open_source([str(jsonl)], partition_bytes=jsonl.stat().st_size // 3 + 1)
    folder = tmp_path_factory.mktemp("small") / "data"
    return prepare(source, folder, PrepareSettings(ray=False, quiet=True))


@pytest.fixture
def url(s3: Any) -> str:
    return f"s3://{s3.bucket}/folder/data"


def uploads(s3: Any) -> list[str]:
    return [path.split("/data/")[1].split("?")[0] for method, path, _ in s3.log if method == "PUT"]


def at(s3: Any, url: str) -> dict[str, bytes]:
    """What is stored there, asked for without faults."""
    s3.plan = lambda method, path, headers: None
    base = url.removeprefix("s3://") + "/"
    return {path.removeprefix(base): s3.filesystem.cat_file(path) for path in s3.filesystem.find(base)}


def test_data_come_back_as_they_went_with_the_manifest_last(
    s3: Any, url: str, small: Manifest, tmp_path: Path, snapshot: Snapshot
) -> None:
    expected = snapshot(small.folder)
    done = push(small.folder, url, quiet=True)
    assert (done.copied, done.kept) == (len(expected), 0)
    assert uploads(s3)[-2:] == [CHECKSUMS, "manifest.json"]
    stored = at(s3, url)
    listing = json.loads(stored.pop(CHECKSUMS))
    assert stored == expected and {entry["name"] for entry in listing["files"]} == set(expected)
    done = pull(url, tmp_path / "copy", quiet=True)
    assert (done.copied, done.kept) == (len(expected), 0)
    assert snapshot(tmp_path / "copy") == expected
    # Once more, both ways: everything is compared and nothing copied.
    s3.log.clear()
    assert push(tmp_path / "copy", url, quiet=True).copied == 0 and not uploads(s3)
    s3.log.clear()
    assert pull(url, tmp_path / "copy", quiet=True).copied == 0
    assert not any(".bin" in path for _, path, _ in s3.log)


def test_failures_on_the_way_change_nothing(
    s3: Any, url: str, small: Manifest, tmp_path: Path, snapshot: Snapshot
) -> None:
    """Every fourth request fails: 500, 503, a connection cut, a byte changed, in turn."""
    counts, guard = {"GET": 0, "PUT": 0}, threading.Lock()

    def plan(method: str, path: str, headers: Any) -> Any:
        # A header has no checksum of its own; what it says is compared later.
        if method not in counts or "/data/" not in path:
            return None
        with guard:
            counts[method] += 1
            turn, nth = divmod(counts[method], 4)
        kinds = [500, 503, "cut", "flip"] if method == "GET" else [500, 503, "flip-upload"]
        return None if nth else kinds[turn % len(kinds)]

    s3.plan = plan
    push(small.folder, url, quiet=True, jobs=3)
    wrong = set(s3.done)
    assert {500, 503, "cut", "flip", "flip-upload"} <= wrong
    stored = at(s3, url)
    stored.pop(CHECKSUMS)
    assert stored == snapshot(small.folder)
    s3.done.clear()
    s3.plan = plan
    pull(url, tmp_path / "copy", quiet=True, jobs=3)
    assert {500, 503, "cut", "flip"} <= set(s3.done)
    assert snapshot(tmp_path / "copy") == snapshot(small.folder)


@pytest.mark.parametrize("fault", ["flip", "flip-upload", 503])
def test_a_file_that_never_comes_right_is_named_and_no_manifest_is_left(
    s3: Any, url: str, small: Manifest, tmp_path: Path, fault: Any
) -> None:
    method = "PUT" if fault == "flip-upload" else "GET"
    plan = lambda verb, path, headers: fault if verb == method and "train-00001.bin" in path else None  # noqa: E731
    s3.plan = plan
    with pytest.raises(
        UserError, match=r"data/train-00001\.bin: (checksum differs after|gave up after|its stored checksum)"
    ) as error:
        push(small.folder, url, quiet=True)
    assert "\n" not in str(error.value)
    s3.plan = lambda method, path, headers: None
    assert not s3.filesystem.exists(f"{url}/manifest.json")
    with pytest.raises(UserError, match=r"holds no manifest\.json: not \(completely\) written by"):
        pull(url, tmp_path / "copy", quiet=True)
    push(small.folder, url, quiet=True)
    if method == "GET":
        s3.plan = plan
        with pytest.raises(
            UserError, match=r"train-00001\.bin: (checksum differs after|gave up after|its stored checksum)"
        ):
            pull(url, tmp_path / "copy", quiet=True)
        with pytest.raises(UserError, match=r"not \(completely\) prepared"):
            load_manifest(tmp_path / "copy")
        assert not list((tmp_path / "copy").glob(".tmp-*"))


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_killed_transfer_begun_again_copies_the_rest(
    s3: Any, url: str, small: Manifest, tmp_path: Path, snapshot: Snapshot, direction: str
) -> None:
    method, copy = ("PUT" if direction == "push" else "GET"), tmp_path / "copy"
    if direction == "pull":
        push(small.folder, url, quiet=True)
    reached, seen = threading.Event(), list[str]()

    def plan(verb: str, path: str, headers: Any) -> Any:
        if verb == method and path.endswith((".bin", ".idx")):
            seen.append(path)
            if len(seen) == 7:
                reached.set()
                time.sleep(2)
                return 503
        return None

    s3.plan = plan
    words = [str(small.folder), url] if direction == "push" else [url, str(copy)]
    script = "from spikescale.cli.main import entry; entry()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "data", direction, *words, "--quiet", "--jobs", "1"], env=os.environ
    )
    assert reached.wait(timeout=120)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stored = at(s3, url) if direction == "push" else snapshot(copy)
    assert "manifest.json" not in stored and sum(name.endswith(".bin") for name in stored) >= 3
    if direction == "push":
        done = push(small.folder, url, quiet=True)
        pull(url, copy, quiet=True)
    else:
        done = pull(url, copy, quiet=True)
    assert done.kept >= 6 and done.copied > 6
    assert snapshot(copy) == snapshot(small.folder)


@pytest.fixture
def other(tmp_path: Path, jsonl: Path) -> Path:
    """Another data set."""
    path = tmp_path / "other.jsonl"
    path.write_bytes(b"".join(jsonl.read_bytes().splitlines(keepends=True)[:200]))
    folder = tmp_path / "other"
    prepare(open_source([str(path)]), folder, PrepareSettings(ray=False, quiet=True))
    return folder


def test_other_data_are_not_replaced_unasked(
    s3: Any, url: str, small: Manifest, other: Path, tmp_path: Path, snapshot: Snapshot
) -> None:
    push(small.folder, url, quiet=True)
    before = at(s3, url)
    with pytest.raises(UserError, match="holds another data set; choose another URL, or --overwrite"):
        push(other, url, quiet=True)
    assert at(s3, url) == before
    with pytest.raises(UserError, match=r"other: holds another data set than s3://"):
        pull(url, other, quiet=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"full: holds thesis\.txt, which is not of s3://"):
        pull(url, tmp_path / "full", quiet=True)
    s3.log.clear()
    push(other, url, overwrite=True, quiet=True)
    changes = [(method, path) for method, path, _ in s3.log if method in ("PUT", "DELETE")]
    assert changes[0][0] == "DELETE" and "manifest.json" in changes[0][1]
    pull(url, tmp_path / "copy", quiet=True)
    assert snapshot(tmp_path / "copy") == snapshot(other)


def test_training_data_at_a_url_are_a_checked_folder_in_the_cache(
    s3: Any,
    url: str,
    small: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: Snapshot,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        localise(url)
    push(small.folder, url, quiet=True)
    s3.log.clear()
    with ThreadPoolExecutor(4) as ranks:
        folders = set(ranks.map(localise, [url] * 4))
    (folder,) = folders
    assert folder.parent == tmp_path / "cache" / "spikescale" / "data"
    assert folder.name.startswith(small.sha256[:32])
    assert snapshot(folder) == snapshot(small.folder)
    assert load_manifest(folder).sha256 == small.sha256
    fetched = [path for method, path, _ in s3.log if method == "GET" and path.endswith(".bin")]
    assert len(fetched) == len(set(fetched)) == len(list(small.folder.glob("*.bin")))
    # A damaged copy is mended: only the damaged file is fetched again.
    shard = folder / "train-00002.bin"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    s3.log.clear()
    assert localise(url) == folder and snapshot(folder) == snapshot(small.folder)
    assert [path for method, path, _ in s3.log if path.endswith(".bin") and method == "GET"] == [
        path for path in fetched if "train-00002.bin" in path
    ]
    assert localise(small.folder) == small.folder
    assert localise(f"file://{small.folder}") == small.folder


def test_file_urls_work_like_any(small: Manifest, tmp_path: Path, snapshot: Snapshot) -> None:
    push(small.folder, f"file://{tmp_path}/store", quiet=True)
    pull(f"file://{tmp_path}/store", tmp_path / "copy", quiet=True)
    assert snapshot(tmp_path / "copy") == snapshot(small.folder)
    # Storage that checks nothing itself: our own checksum does.
    shard = tmp_path / "store" / "train-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"train-00001\.bin: checksum differs after each of 6 fetches"):
        pull(f"file://{tmp_path}/store", tmp_path / "damaged", quiet=True)
    assert not (tmp_path / "damaged" / "manifest.json").exists()
    assert not (tmp_path / "damaged" / "train-00001.bin").exists()
    assert push(small.folder, f"file://{tmp_path}/store", quiet=True).copied == 1
    assert shard.read_bytes() == whole
    listing = json.loads((tmp_path / "store" / CHECKSUMS).read_text())
    listing["files"][0]["name"] = "../outside"
    (tmp_path / "store" / CHECKSUMS).write_text(json.dumps(listing))
    with pytest.raises(UserError, match=r"refuses the name '\.\./outside', which points outside"):
        pull(f"file://{tmp_path}/store", tmp_path / "no", quiet=True)
    listing["files"] = [entry for entry in listing["files"] if entry["name"] != "manifest.json"]
    del listing["files"][0]
    (tmp_path / "store" / CHECKSUMS).write_text(json.dumps(listing))
    with pytest.raises(UserError, match="do not belong together"):
        pull(f"file://{tmp_path}/store", tmp_path / "no", quiet=True)


def test_a_disk_that_fills_while_pulling_is_one_line(
    small: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot
) -> None:
    push(small.folder, f"file://{tmp_path}/store", quiet=True)
    real = os.fsync

    def full(descriptor: int) -> None:
        if "train-00002.bin" in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"copy: writing failed \(No space left on device\); make room"):
            pull(f"file://{tmp_path}/store", tmp_path / "copy", quiet=True)
    assert not (tmp_path / "copy" / "manifest.json").exists()
    pull(f"file://{tmp_path}/store", tmp_path / "copy", quiet=True)
    assert snapshot(tmp_path / "copy") == snapshot(small.folder)


def test_the_commands_say_what_they_did(
    s3: Any, url: str, small: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "push", str(small.folder), url, "--jobs", "4"]) == 0
    captured = capsys.readouterr()
    count = len([path for path in small.folder.rglob("*") if path.is_file()])
    assert f"{url}: {count} files copied, 0 were there" in captured.out
    assert f"data set {small.sha256[:12]}" in captured.out
    assert captured.err.startswith(f"pushing: {count}/{count} files, ")
    assert main(["data", "pull", url, str(tmp_path / "copy"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    shutil.rmtree(tmp_path / "copy")
    s3.plan = lambda method, path, headers: 403
    for words, expected in (
        (["pull", url, str(tmp_path / "copy")], "access refused; check the credentials"),
        (["push", str(tmp_path / "none"), url], "no such data folder"),
        (["push", str(small.folder), "bucket/data"], "bucket/data: is no URL; give one such as s3://"),
        (["pull", url, str(tmp_path / "copy"), "--jobs", "0"], "--jobs 0: must be at least 1"),
    ):
        assert main(["data", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
        assert "the-secret" not in error and "the-key-id" not in error
