"""Sources by URL, on a real S3 server on loopback: the documents of local files, whatever happens."""

import gzip
import io
import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from spikescale.data_pipeline import storage
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import Document, ReadOptions, open_source
from spikescale.data_pipeline.sources.files import FilesSource
from spikescale.errors import UserError


def documents(*paths: str | Path, **options: Any) -> list[Document]:
    source = FilesSource("test", list(paths), ReadOptions(**options))
    return [document for part in source.partitions() for document in part.documents()]


def read(*paths: str | Path, **options: Any) -> list[str]:
    return [document.text for document in documents(*paths, **options)]


@pytest.fixture
def corpus(tmp_path: Path, jsonl: Path, texts: list[str]) -> Path:
    """The same documents in every format."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    content = jsonl.read_bytes()
    (folder / "a.jsonl").write_bytes(content)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "deep" / "c.jsonl.zst").write_bytes(zstandard.compress(content))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "d.parquet", row_group_size=40)
    (folder / "e.txt").write_text("\n".join(text.replace("\n", " ") for text in texts))
    (folder / "note.csv").write_text("not a source")
    return folder


def upload(s3: Any, folder: Path) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            s3.filesystem.pipe_file(f"{s3.bucket}/{path.relative_to(folder.parent)}", path.read_bytes())
    s3.log.clear()
    return f"s3://{s3.bucket}/{folder.name}"


@pytest.mark.parametrize("partition_bytes", [1 << 20, 5000])
def test_every_format_and_range_gives_what_local_files_give(
    s3: Any, corpus: Path, partition_bytes: int
) -> None:
    url = upload(s3, corpus)
    options = {"partition_bytes": partition_bytes, "split_on": "line"}
    local = FilesSource("test", [corpus], ReadOptions(**options)).partitions()  # type: ignore[arg-type]
    remote = FilesSource("test", [url], ReadOptions(**options)).partitions()  # type: ignore[arg-type]
    assert [part.label for part in remote] == [part.label for part in local]
    assert [part.size_bytes for part in remote] == [part.size_bytes for part in local]
    assert (len(remote) > 40) == (partition_bytes == 5000)
    for ours, theirs in zip(pickle.loads(pickle.dumps(remote)), local, strict=True):
        assert [document.text for document in ours.documents()] == [
            document.text for document in theirs.documents()
        ]
    assert read(f"{url}/*.jsonl*") == read(f"{corpus}/*.jsonl*")
    assert read(f"{url}/**/c.jsonl.zst") == read(corpus / "deep" / "c.jsonl.zst")
    assert read(f"{url}/d.parquet") == read(corpus / "d.parquet") == read(f"file://{corpus}/d.parquet")


def test_a_web_server_is_read_in_the_same_way(s3: Any, corpus: Path) -> None:
    upload(s3, corpus)
    names = ("a.jsonl", "d.parquet")
    for name in names:
        s3.filesystem.call_s3("put_object_acl", Bucket=s3.bucket, Key=f"corpus/{name}", ACL="public-read")
    faults = iter([503, 503, 503, None, 500, "cut", "cut"])
    s3.plan = lambda method, path, headers: next(faults, None)
    web = [f"{s3.address}/{s3.bucket}/corpus/{name}" for name in names]
    assert read(*web) == read(*(corpus / name for name in names))
    assert len(s3.done) >= 5
    with pytest.raises(UserError, match=r"corpus/none\.jsonl: no such file or folder"):
        read(f"{s3.address}/{s3.bucket}/corpus/none.jsonl")
    with pytest.raises(UserError, match=r"corpus/e\.txt: the server answered 403"):
        read(f"{s3.address}/{s3.bucket}/corpus/e.txt")


def test_preparation_gives_the_same_tokens_and_knows_when_a_file_changes(
    s3: Any, corpus: Path, tmp_path: Path, jsonl: Path
) -> None:
    url = f"{upload(s3, corpus)}/a.jsonl"
    settings = PrepareSettings(ray=False, quiet=True)
    size = jsonl.stat().st_size // 10 + 1
    for name, path in (("local", str(corpus / "a.jsonl")), ("remote", url)):
        prepare(open_source([path], partition_bytes=size), tmp_path / name, settings)
    for path in (tmp_path / "local").glob("*"):
        if path.suffix in (".bin", ".idx") or path.name == "manifest.json":
            assert (tmp_path / "remote" / path.name).read_bytes() == path.read_bytes()
    source = open_source([url], partition_bytes=size)
    parts, before = source.partitions(), source.identity()
    changed = bytearray(jsonl.read_bytes())
    changed[len(changed) // 2] ^= 1
    s3.filesystem.pipe_file(url, bytes(changed))
    with pytest.raises(UserError, match=r"a\.jsonl: was changed while it was being read; begin again"):
        list(parts[3].documents())
    assert open_source([url], partition_bytes=size).identity() != before
    with pytest.raises(UserError, match=r"holds data prepared otherwise \(source differ\)"):
        prepare(open_source([url], partition_bytes=size), tmp_path / "remote", settings)


def test_a_part_costs_its_bytes_and_not_the_file(s3: Any, tmp_path: Path) -> None:
    import numpy as np

    noise = np.random.default_rng(0).integers(33, 127, (40, 100_000), dtype=np.uint8)
    texts = [row.tobytes().decode() for row in noise]
    path = tmp_path / "big" / "big.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=4, compression="none")
    url = f"{upload(s3, path.parent)}/big.parquet"
    parts = FilesSource("test", [url], ReadOptions(partition_bytes=400_000)).partitions()
    assert len(parts) == 10
    s3.log.clear()
    assert [document.text for document in parts[6].documents()] == texts[24:28]
    ranges = [entry[2].removeprefix("bytes=").split("-") for entry in s3.log if entry[0] == "GET"]
    assert ranges and sum(int(end) - int(begin) + 1 for begin, end in ranges) < 1_500_000
    assert path.stat().st_size > 4_000_000


def test_what_passes_is_tried_again_from_where_it_broke(
    s3: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [f'{{"text": "{number} {"x" * 1000}"}}' for number in range(3000)]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text("\n".join(lines))
    url = f"{upload(s3, tmp_path / 'c')}/a.jsonl"
    faults = iter([None, 500, None, "cut", 503, "cut", None, None, 429])
    s3.plan = lambda method, path, headers: next(faults, None) if method == "GET" else None
    with caplog.at_level(logging.WARNING):
        found = read(url)
    assert found == [json.loads(line)["text"] for line in lines]
    assert s3.done == [500, "cut", 503, "cut"]
    assert sum("trying again in" in record.message for record in caplog.records) == 4
    whole = [entry[2] for entry in s3.log if entry[0] == "GET"]
    # Four ranges, each longer than the one before, and each of the broken ones asked for again as it was.
    assert len(whole) == len(set(whole)) + 4 and len(set(whole)) >= 3


def test_what_stays_is_one_line(s3: Any, corpus: Path) -> None:
    url = upload(s3, corpus)
    part = FilesSource("t", [f"{url}/a.jsonl"], ReadOptions(bad_records="quarantine")).partitions()[0]
    for status, words in ((503, "gave up after 6 attempts"), (403, "access refused; check the credentials")):
        s3.plan = lambda method, path, headers, status=status: status
        for action in (lambda: read(url), lambda: list(part.documents())):  # no bad record, but bad storage
            s3.log.clear()
            with pytest.raises(UserError, match=words) as error:
                action()
            assert "\n" not in str(error.value) and "secret" not in str(error.value)
            assert len(s3.log) == (6 if status == 503 else 1)
    s3.plan = lambda method, path, headers: None
    for missing, words in (
        (f"{url}/none.jsonl", "no such file or folder"),
        (f"{url}/*.none", "no file matches"),
        ("s3://no-such-bucket-1234/a", "no such file or folder"),
        ("nothing://x/a.jsonl", "nothing"),
    ):
        with pytest.raises(UserError, match=words):
            read(missing)
    s3.filesystem.pipe_file(f"{s3.bucket}/csv/a.csv", b"x")
    with pytest.raises(UserError, match=r"no file ending in \.jsonl"):
        read(f"s3://{s3.bucket}/csv")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^gs://bucket/a: the package for gs:// is not installed: ") as error:
        open_source(["gs://bucket/a"])
    assert str(error.value).endswith("pip install 'spikescale[gcs]'")


def test_what_is_secret_in_a_url_is_not_shown() -> None:
    file = storage.RemoteFile("https://me:pass@host/a/b.jsonl.gz?X-Signature=abc", 5, "")
    assert str(file) == "https://host/a/b.jsonl.gz?..."
    assert (file.name, file.suffix) == ("b.jsonl.gz", ".gz")
    text = "400, url='http://u:p@h/x?token=1', message='http://h/y'"
    assert storage.shown(text) == "400, url='http://h/x?...', message='http://h/y'"


def test_a_catalogue_may_name_urls(s3: Any, corpus: Path, tmp_path: Path, texts: list[str]) -> None:
    catalog = tmp_path / "my.yaml"
    catalog.write_text(f"mine:\n  files: [{upload(s3, corpus)}/a.jsonl, corpus/d.parquet]\n")
    source = open_source(["mine"], catalogs=[catalog])
    assert [d.text for part in source.partitions() for d in part.documents()] == texts * 2


def test_a_server_that_ignores_ranges_or_sends_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 3000

    class Server:
        def __init__(self) -> None:
            self.answers: list[bytes] = []

        def info(self, path: str) -> dict[str, Any]:
            return {"size": len(content), "ETag": "1", "type": "file"}

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            return self.answers.pop(0) if self.answers else content[start:end]

    server = Server()
    monkeypatch.setattr(storage, "open_filesystem", lambda url: (server, url))
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.001)
    file = storage.describe("http://host/a")
    server.answers = [content[:7], content, content[:100]]
    with file.open() as reader:
        assert reader.read() == content and server.answers == []
    with file.open() as reader:
        reader.seek(-10, io.SEEK_END)
        server.answers = [content]
        assert reader.read() == content[-10:]
    monkeypatch.setattr(storage, "LONGEST_RANGE", 100_000)
    server.answers = [content]
    with file.open() as reader, pytest.raises(UserError, match="gives no byte ranges; fetch the file first"):
        reader.read(5)
