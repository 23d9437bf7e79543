"""Documents out of files, catalogues and plug-ins; malformed input in one clear line."""

import gzip
import io
import json
import os
import stat
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from spikescale.data_pipeline.sources import ReadOptions, list_sources, open_source
from spikescale.data_pipeline.sources import catalog as catalog_module
from spikescale.data_pipeline.sources.archive import extract_cached
from spikescale.data_pipeline.sources.fetch import Package, fetch
from spikescale.data_pipeline.sources.files import FilesSource
from spikescale.data_pipeline.sources.hub import HubData, HubSource
from spikescale.data_pipeline.sources.streams import read_lines
from spikescale.errors import UserError
from spikescale.files import sha256_file


def read(*paths: Path | str, **options: object) -> list[str]:
    source = FilesSource("test", list(paths), ReadOptions(**options))  # type: ignore[arg-type]
    return [document.text for part in source.partitions() for document in part.documents()]


def complaint(*paths: Path | str, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        read(*paths, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_parquet(path: Path, texts: list[str], row_group_size: int = 1000, column: str = "text") -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path, row_group_size=row_group_size)


def test_every_format_plain_and_compressed_gives_the_same_documents(
    tmp_path: Path, jsonl: Path, texts: list[str]
) -> None:
    content = jsonl.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    # Two frames, as tools that append write them.
    half = content.index(b"\n", len(content) // 2) + 1
    frames = [zstandard.compress(content[:half]), zstandard.compress(content[half:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    write_parquet(tmp_path / "a.parquet", texts)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    (tmp_path / "a.txt").write_text("\x01".join(texts), encoding="utf-8")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress((tmp_path / "a.txt").read_bytes()))
    assert read(jsonl) == texts
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.parquet.gz"):
        assert read(tmp_path / name) == texts, name
    for name in ("a.txt", "a.txt.zst"):
        assert read(tmp_path / name, split_on="\x01") == texts, name


def test_a_text_file_is_one_document_or_cut_by_lines_blank_lines_or_a_regex(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("SCENE 1\nöne\n\n \ntwo\nSCENE 2\nthree".encode())
    assert read(path) == ["SCENE 1\nöne\n\n \ntwo\nSCENE 2\nthree"]
    assert read(path, split_on="line") == ["SCENE 1", "öne", "two", "SCENE 2", "three"]
    assert read(path, split_on="blank-line") == ["SCENE 1\nöne", "two\nSCENE 2\nthree"]
    assert read(path, split_on="(?m)^(?=SCENE)") == ["SCENE 1\nöne\n\n \ntwo\n", "SCENE 2\nthree"]
    assert "not a regular expression" in complaint(path, split_on="(")


@pytest.mark.parametrize("partition_bytes", [1, 7, 100, 1000, 10_000])
def test_byte_ranges_of_a_file_share_no_line_and_miss_none(
    jsonl: Path, texts: list[str], partition_bytes: int
) -> None:
    if partition_bytes < 100:
        lines = jsonl.read_bytes().splitlines(keepends=True)[:30]
        small = jsonl.with_name(f"small-{partition_bytes}.jsonl")
        small.write_bytes(b"".join(lines))
        assert read(small, partition_bytes=partition_bytes) == texts[:30]
    else:
        source = FilesSource("test", [jsonl], ReadOptions(partition_bytes=partition_bytes))
        assert len(source.partitions()) == -(-jsonl.stat().st_size // partition_bytes)
        assert read(jsonl, partition_bytes=partition_bytes) == texts


def test_lines_longer_than_a_read_and_a_missing_last_line_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = [b"a" * 3_000_000, b"", b"b" * (1 << 20), b"end"]
    path.write_bytes(b"\n".join(lines))
    assert [line.content for line in read_lines(path)] == lines
    assert [line.content for line in read_lines(path, 3_000_001)] == lines[1:]


def test_parquet_is_partitioned_by_row_groups(tmp_path: Path, texts: list[str]) -> None:
    write_parquet(tmp_path / "a.parquet", texts, row_group_size=50)
    source = FilesSource("test", [tmp_path / "a.parquet"], ReadOptions(partition_bytes=4000))
    parts = source.partitions()
    assert len(parts) >= 4
    assert [document.text for part in parts for document in part.documents()] == texts


def test_small_files_of_a_folder_or_glob_are_grouped_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in range(25):
        folder = tmp_path / ("x" if number % 2 else "y")
        folder.mkdir(exist_ok=True)
        (folder / f"{number:02d}.txt").write_text(f"text {number:02d}" + "." * 92)
    (tmp_path / "x" / ".hidden.txt").write_text("no")
    (tmp_path / "x" / "note.csv").write_text("no")
    source = FilesSource("test", [tmp_path], ReadOptions(partition_bytes=1000))
    assert [part.size_bytes for part in source.partitions()] == [990, 990, 495]
    numbers = [int(text[5:7]) for text in read(tmp_path)]
    assert numbers == [*range(1, 25, 2), *range(0, 25, 2)]
    assert len(read(str(tmp_path / "*" / "*.txt"))) == 25


def test_a_list_of_turns_becomes_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": ["a", "b"]}, {"text": [{"role": "user", "content": "c"}, {"content": "d"}]}]
    path.write_text("\n".join(json.dumps(record) for record in records))
    assert read(path) == ["a\n\nb", "c\n\nd"]


def test_malformed_lines_are_named_by_file_and_line_number(tmp_path: Path) -> None:
    good = b'{"text": "fine"}\n'
    path = tmp_path / "a.jsonl"
    for bad, words in (
        (b'{"body": 1}', ["no key 'text'", "'body'"]),
        (b'{"text": 5}', ["must hold text", "int"]),
        (b'{"text": null}', ["null"]),
        (b'{"text": "x', ["not valid JSON"]),
        (b"[1]", ["must be a JSON object"]),
        (b'{"text": "\xff"}', ["not valid utf-8", "0xff"]),
    ):
        path.write_bytes(good * 20 + b"\n" + bad + b"\n" + good * 20)
        for size in (1 << 20, 100):  # the whole file, and a range far from its start
            message = complaint(path, partition_bytes=size)
            assert message.startswith(f"{path}, line 22: "), message
            assert all(word in message for word in words), message
    text = tmp_path / "b.txt"
    text.write_bytes(b"one\ntwo\n\xe9t\xe9\n")
    assert complaint(text).startswith(f"{text}, line 3: not valid utf-8 (byte 0xe9)")
    assert read(text, encoding="latin-1") == ["one\ntwo\nété\n"]
    assert read(text, invalid_bytes="replace") == ["one\ntwo\n\ufffdt\ufffd\n"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_and_damaged_compressed_files_are_refused(tmp_path: Path, jsonl: Path, suffix: str) -> None:
    content = jsonl.read_bytes()
    whole = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    path = tmp_path / f"a.jsonl{suffix}"
    for kept in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert f"{path}: truncated" in complaint(path)
    path.write_bytes(b"plain text, not compressed at all")
    assert f"{path}: damaged or not" in complaint(path)


def test_parquet_with_a_wrong_column_or_a_missing_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["x"], column="body")
    assert complaint(path) == f"{path}: no column 'text'; there are 'body'"
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}: not a whole parquet file" in complaint(path)


def test_missing_paths_and_unknown_suffixes_are_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in complaint(tmp_path / "none.txt")
    assert "no file ending in" in complaint(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    assert "--format" in complaint(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", format="text") == ["x"]
    with pytest.raises(UserError, match=r"--source nowhere: neither .* shakespeare, sotu"):
        open_source(["nowhere"])
    with pytest.raises(UserError, match="one name"):
        open_source(["sotu", str(tmp_path)])


def test_hub_data_sets_are_read_shard_by_shard(tmp_path: Path, texts: list[str]) -> None:
    files = []
    for number in range(3):
        part = texts[number * 50 : number * 50 + 50]
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in part), encoding="utf-8")
        files.append(str(path))
    data = HubData("json", data_files=tuple(files), text_key="body")
    parts = HubSource("local", [(data, None)]).partitions()
    assert len(parts) == 3
    assert [document.text for part in parts for document in part.documents()] == texts[:150]
    with pytest.raises(UserError, match="row 1: no column 'text'; there are 'body'"):
        list(
            HubSource("local", [(HubData("json", data_files=tuple(files)), None)]).partitions()[0].documents()
        )
    write_parquet(tmp_path / "a.parquet", [" = One = \n", "x\n", " = = Part = = \n", " = Two = \n", "y\n"])
    rows = HubData("parquet", data_files=(str(tmp_path / "a.parquet"),), row_start=r"^ = [^=].* = \s*$")
    (part,) = HubSource("local", [(rows, "valid")]).partitions()
    assert [document.text for document in part.documents()] == [
        " = One = \nx\n = = Part = = \n",
        " = Two = \ny\n",
    ]
    assert part.split == "valid"


def test_a_hub_that_cannot_be_reached_is_one_clear_line() -> None:
    with pytest.raises(UserError) as caught:
        open_source(["minipile"]).partitions()
    assert str(caught.value).startswith("JeanKaddour/minipile train: the HF hub cannot be reached")
    assert "\n" not in str(caught.value)


def test_a_users_catalogue_adds_sources_relative_to_its_file(tmp_path: Path, jsonl: Path) -> None:
    catalog = tmp_path / "my.yaml"
    relative = os.path.relpath(jsonl, tmp_path)
    catalog.write_text(f"mine:\n  files: {relative}\n  text_key: text\n  summary: my own\n")
    listed = {info.name: info for info in list_sources([catalog])}
    assert listed["mine"].kind == "files" and listed["mine"].summary == "my own"
    assert listed["shakespeare"].kind == "built-in" and listed["fineweb"].kind == "hub"
    source = open_source(["mine"], catalogs=[catalog])
    assert sum(1 for part in source.partitions() for _ in part.documents()) == 400
    catalog.write_text("mine:\n  files: x\n  text_kye: text\n")
    with pytest.raises(UserError, match=r"my.yaml: mine.text_kye: unknown key; allowed: summary, licence"):
        list_sources([catalog])
    catalog.write_text("mine: {summary: none}\n")
    with pytest.raises(UserError, match="exactly one of package, hub, files"):
        list_sources([catalog])


def test_a_plug_in_adds_a_source(monkeypatch: pytest.MonkeyPatch, jsonl: Path) -> None:
    point = SimpleNamespace(name="plugged", value="pkg:make", load=lambda: lambda: {"files": str(jsonl)})
    monkeypatch.setattr(catalog_module.importlib.metadata, "entry_points", lambda group: [point])
    assert "plugged" in {info.name for info in list_sources()}
    source = open_source(["plugged"])
    assert source.name == "plugged"
    assert sum(1 for part in source.partitions() for _ in part.documents()) == 400


def fake_program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_package_is_fetched_once_and_only_with_the_right_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    (tmp_path / "content").write_bytes(b"package content")
    fake_program(programs, "npm", f"echo run >> {tmp_path}/runs; cp {tmp_path}/content package.tgz")
    right = sha256_file(tmp_path / "content")
    package = Package(tool="npm", package="@a/b", version="1.0", sha256=right, bytes=15)
    assert fetch(package).read_bytes() == b"package content"
    assert fetch(package).read_bytes() == b"package content"
    assert (tmp_path / "runs").read_text().count("run") == 1
    wrong = package.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(UserError, match=rf"@a/b==1\.0: sha256 is {right}, expected 0000"):
        fetch(wrong)
    fake_program(programs, "npm", "echo 'npm error code E404' >&2; exit 1")
    with pytest.raises(UserError, match=r"@a/b 1.0: npm could not fetch it \(npm error code E404\)"):
        fetch(wrong)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"needs the program npm, which is not there: install Node.js"):
        fetch(wrong)
    assert [path.name for path in (tmp_path / "cache" / "spikescale" / "downloads").iterdir()] == [
        f"{right[:16]}-a-b"
    ]


def test_an_archive_gives_matching_members_and_none_that_points_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def archive(names: list[str]) -> Path:
        path = tmp_path / f"{len(names)}.tgz"
        with tarfile.open(path, "w:gz") as file:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = 3
                file.addfile(entry, io.BytesIO(b"abc"))
            link = tarfile.TarInfo("p/link.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(link)
        return path

    folder = extract_cached(archive(["p/a.txt", "p/b.json", "p/d/c.txt"]), "p/*.txt", "k1")
    assert [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.*"))] == [
        "p/a.txt",
        "p/d/c.txt",
    ]
    with pytest.raises(UserError, match="no member matches 'q/"):
        extract_cached(archive(["p/a.txt"]), "q/*", "k2")
    with pytest.raises(UserError, match=r"refuses the member '\.\./evil.txt'"):
        extract_cached(archive(["p/a.txt", "../evil.txt"]), "*.txt", "k3")
    assert not (tmp_path / "cache" / "spikescale" / "evil.txt").exists()
