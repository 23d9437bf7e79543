"""Bad records: the tokens are those of the input without them, and each is written down with its place."""

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from spikescale.cli.main import main
from spikescale.data_pipeline.clean import CleanSettings
from spikescale.data_pipeline.manifest import Manifest, load_manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import Document, ReadOptions, open_source
from spikescale.data_pipeline.sources.files import FilesSource
from spikescale.data_pipeline.sources.hub import HubData, HubSource
from spikescale.data_pipeline.stream import iterate_documents
from spikescale.data_pipeline.tokenizers import load_tokenizer
from spikescale.errors import UserError

Snapshot = Callable[[Path], dict[str, bytes]]
LIMIT = 1 << 20


def prepared_from(source: Path, output: Path, share: float = 0.05, **options: Any) -> Manifest:
    settings = PrepareSettings(ray=False, quiet=True, bad_records="quarantine", max_bad_share=share)
    reading = {"bad_records": "quarantine", "max_record_bytes": LIMIT, **options}
    return prepare(open_source([str(source)], **reading), output, settings)


def entries(output: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(output.glob("quarantine-*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def tokens(output: Path) -> dict[str, bytes]:
    """What training reads: shards and manifest, without the sidecars' notes on how they were made."""
    kept = [*output.glob("*.bin"), *output.glob("*.idx"), output / "manifest.json"]
    return {path.name: path.read_bytes() for path in kept}


def read(path: Path, **options: Any) -> tuple[list[str], list[Document]]:
    source = FilesSource("test", [path], ReadOptions(bad_records="quarantine", **options))
    documents = [document for part in source.partitions() for document in part.documents()]
    return (
        [document.text for document in documents if not document.fault],
        [document for document in documents if document.fault],
    )


POISON = {
    "encoding": (b'{"text": "caf\xe9"}', "not valid utf-8 (byte 0xe9 at position 13)"),
    "json": (b'{"text": "x', "not valid JSON (Unterminated string"),
    "digits": (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "not valid JSON (Exceeds the limit"),
    "deep": (b"[" * 100_000, "JSON nested too deeply"),
    "key": (b'{"body": "x"}', "no key 'text'; there are 'body'"),
    "type": (b'{"text": 7}', "'text' must hold text (or a list of texts), not int"),
    "list": (b"[1]", "must be a JSON object, not list"),
    "surrogate": (b'{"text": "a\\ud800b"}', "not valid Unicode (lone surrogate U+D800)"),
    "long": (b'{"text": "' + b"y" * (2 * LIMIT) + b'"}', "longer than 1 MiB"),
}


def test_poisoned_lines_leave_the_tokens_of_the_input_without_them(
    tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = jsonl.read_bytes().splitlines(keepends=True)
    lines = list(good)
    for number, (record, _) in enumerate(POISON.values()):
        lines.insert(7 + 31 * number, record + b"\n")
    for name, content in (("clean", good), ("poisoned", lines)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(b"".join(content))
        prepared_from(tmp_path / name / "a.jsonl", tmp_path / f"{name}-out")
    assert tokens(tmp_path / "poisoned-out") == tokens(tmp_path / "clean-out")
    found = entries(tmp_path / "poisoned-out")
    assert len(found) == len(POISON)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    for number, (entry, (record, reason)) in enumerate(zip(found, POISON.values(), strict=True)):
        place = 7 + 31 * number
        assert entry["file"] == "a.jsonl" and entry["line"] == place + 1
        assert entry["offset"] == offsets[place]
        assert entry["reason"].startswith(reason)
        assert entry["excerpt"] == record[:200].decode("utf-8", "backslashreplace")
    summary = json.loads((tmp_path / "poisoned-out" / "quarantine.json").read_text())
    assert summary["records"] == 400 + len(POISON) and summary["bad"] == summary["entries"] == len(POISON)
    assert summary["kinds"] == {"encoding": 1, "json": 3, "schema": 3, "surrogate": 1, "too-long": 1}
    assert summary["files"] == {"quarantine-00000.jsonl": len(POISON)}
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "poisoned-out"), "--no-histogram"]) == 0
    assert "9 bad records of 409 (2.20%) left out: encoding 1, json 3" in capsys.readouterr().out
    assert main(["data", "inspect", str(tmp_path / "clean-out"), "--no-histogram"]) == 0
    assert "no bad records among 400" in capsys.readouterr().out


@pytest.mark.parametrize("partition_bytes", [100, 1000, 10_000])
def test_places_in_byte_ranges_lead_to_the_record(tmp_path: Path, jsonl: Path, partition_bytes: int) -> None:
    lines = jsonl.read_bytes().splitlines(keepends=True)[:60]
    bad = [b"{broken 1\n", b"{broken 2\n", b"{broken " + b"3" * 2500 + b"\n"]
    for position, record in zip((5, 33, 59), bad, strict=True):
        lines.insert(position, record)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content := b"".join(lines))
    good, faulty = read(path, partition_bytes=partition_bytes, max_record_bytes=2000)
    assert good == [json.loads(line)["text"] for line in lines if line not in bad]
    assert [document.fault[:11] for document in faulty] == ["not valid J", "not valid J", "longer than"]
    for document, record in zip(faulty, bad, strict=True):
        facts = dict(document.metadata)
        offset = int(facts["offset"])
        assert content[offset : offset + len(record)] == record
        # The line counts from the range's start, which is said where it is not the file's.
        base = int(facts.get("counted_from", 0))
        before = content[: base - 1].count(b"\n") + 1 if base else 0
        assert content[:offset].count(b"\n") == before + int(facts["line"]) - 1


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_of_100_mb_is_never_held_in_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    content = b'{"text": "before"}\n{"text": "' + b"z" * (100 << 20) + b'"}\n{"text": "after"}\n'
    packed = {"": bytes, ".gz": lambda raw: gzip.compress(raw, 1), ".zst": zstandard.compress}[suffix](
        content
    )
    path.write_bytes(packed)
    del content, packed
    tracemalloc.start()
    good, faulty = read(path, max_record_bytes=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert good == ["before", "after"] and [document.fault for document in faulty] == ["longer than 1 MiB"]
    assert peak < 32 << 20


def test_a_long_line_costs_each_later_range_no_more_than_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"z" * (64 << 20) + b'"}\n{"text": "after"}\n')
    source = FilesSource(
        "t", [path], ReadOptions(bad_records="quarantine", max_record_bytes=LIMIT, partition_bytes=1 << 18)
    )
    from spikescale.data_pipeline.sources import streams

    read_bytes = 0
    whole = streams._chunks_from

    def counted(path: Any, start: int) -> Iterator[bytes]:
        nonlocal read_bytes
        for chunk in whole(path, start):
            read_bytes += len(chunk)
            yield chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_chunks_from", counted)
        found = [document for part in source.partitions() for document in part.documents()]
    assert [document.text for document in found] == ["", "after"]
    assert read_bytes < 2 * len(source.partitions()) * streams.CHUNK


def test_text_that_is_legal_whatever_it_looks_like_gives_no_special_id(tmp_path: Path) -> None:
    texts = [
        "nul \0 inside",
        "<|endoftext|>",
        "a<|endoftext|>b<|padding|>",
        "</s><unk><s>",
        "\x7f\x1b[0m",
    ] * 8
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n, text in enumerate(texts)))
    vocabulary = tmp_path / "tokenizer.json"
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    ids = {symbol: number for number, symbol in enumerate(["<|endoftext|>", "<|padding|>", *alphabet])}
    vocabulary.write_text(
        json.dumps(
            {
                "added_tokens": [
                    {
                        "id": number,
                        "content": name,
                        "special": True,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                    }
                    for number, name in enumerate(["<|endoftext|>", "<|padding|>"])
                ],
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
                "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
                "model": {"type": "BPE", "vocab": ids, "merges": []},
            }
        )
    )
    for spec in ("byte", "char", str(vocabulary)):
        settings = PrepareSettings(tokenizer=spec, ray=False, quiet=True, bad_records="quarantine")
        out = tmp_path / f"out-{Path(spec).stem}"
        source = open_source([str(path)], bad_records="quarantine")
        manifest = prepare(source, out, settings)
        tokenizer = load_tokenizer(manifest.tokenizer_folder)
        decoded = []
        for split in manifest.splits:
            for document in iterate_documents(manifest, split):
                assert not np.isin(document[:-1], [manifest.tokenizer.eos_id]).any()
                if spec not in ("byte", "char"):
                    assert document[:-1].min() > 1 and document[-1] == 0
                decoded.append(tokenizer.decode(document.tolist()))
        if spec != "char":  # whose vocabulary is that of the training split
            assert sorted(decoded) == sorted(f"{n} {text}" for n, text in enumerate(texts))
        assert entries(out) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_gives_what_is_readable_and_one_bad_record(
    tmp_path: Path, jsonl: Path, texts: list[str], suffix: str
) -> None:
    content = jsonl.read_bytes()
    path = tmp_path / f"a.jsonl{suffix}"
    compressor = zstandard.ZstdCompressor().compressobj()
    blocks = b"".join(
        compressor.compress(content[begin : begin + 9000])
        + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for begin in range(0, len(content), 9000)
    )
    whole = gzip.compress(content) if suffix == ".gz" else blocks + compressor.flush()
    path.write_bytes(part := whole[: len(whole) * 2 // 3])
    good, (rest,) = read(path)
    decompressor = zlib.decompressobj(31) if suffix == ".gz" else zstandard.ZstdDecompressor().decompressobj()
    assert good == texts[: decompressor.decompress(part).count(b"\n")] and 100 < len(good) < 300
    assert rest.fault.startswith("truncated: the ") and dict(rest.metadata)["kind"] == "truncated"
    offset = sum(len(line) for line in content.splitlines(keepends=True)[: len(good)])
    assert dict(rest.metadata)["offset"] == str(offset)
    assert dict(rest.metadata)["line"] == str(len(good) + 1)
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" * 100 + whole[len(whole) // 2 + 100 :])
    good, faulty = read(path)
    assert (
        10 < len(good) < 400 and good == texts[: len(good)] and faulty[-1].fault.startswith("damaged or not")
    )


def test_a_text_file_loses_only_the_pieces_that_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntw\xff\xfeo\n\nthr\xc3\xa9e\n\n" + b"x" * 3000 + b"\n\nfive")
    good, faulty = read(path, split_on="blank-line", max_record_bytes=2000)
    assert good == ["one", "thrée", "five"]
    assert [(dict(bad.metadata)["offset"], dict(bad.metadata)["line"]) for bad in faulty] == [
        ("5", "3"),
        ("20", "7"),
    ]
    assert dict(faulty[0].metadata)["excerpt"] == "tw\\xff\\xfeo"
    good, faulty = read(path)
    assert good == [] and faulty[0].fault == "not valid utf-8 (byte 0xff)"
    good, faulty = read(path, max_record_bytes=100)
    assert good == [] and faulty[0].fault.startswith("longer than")
    assert read(path, split_on="line", max_record_bytes=100)[0] == ["one", "thrée", "five"]
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(b"one\n\ntwo\n\nthree and more, not compressible 8f3a1c")[:-12])
    good, (rest,) = read(packed, split_on="blank-line")
    assert good == ["one", "two"] and dict(rest.metadata)["offset"] == "10"


def write_parquets(folder: Path, texts: list[str]) -> list[Path]:
    folder.mkdir()
    paths = []
    for number in range(4):
        part = pyarrow.table({"text": texts[number * 100 : number * 100 + 100]})
        paths.append(folder / f"{number}.parquet")
        pyarrow.parquet.write_table(part, paths[-1], row_group_size=25, compression="none")
    return paths


@pytest.mark.parametrize("kind", ["missing", "type", "cut", "damaged", "null"])
def test_one_bad_parquet_among_several(tmp_path: Path, texts: list[str], kind: str) -> None:
    paths = write_parquets(tmp_path / "bad", texts)
    kept, expected = 0, ("schema", 101 - 1, 1)
    if kind == "missing":
        pyarrow.parquet.write_table(pyarrow.table({"body": ["x"] * 100}), paths[2])
        reason = "no column 'text'; there are 'body'"
    elif kind == "type":
        pyarrow.parquet.write_table(pyarrow.table({"text": list(range(100))}), paths[2])
        reason = "column 'text' must hold text (or lists of texts), not int64"
    elif kind == "cut":
        paths[2].write_bytes(paths[2].read_bytes()[:-500])
        reason, expected = "not a whole parquet file", ("damaged", 1, 1)
    elif kind == "damaged":
        content = bytearray(paths[2].read_bytes())
        group = pyarrow.parquet.ParquetFile(paths[2]).metadata.row_group(2).column(0)
        begin = group.dictionary_page_offset or group.data_page_offset
        content[begin : begin + 40] = b"\xff" * 40
        paths[2].write_bytes(content)
        reason, kept, expected = "damaged parquet", 50, ("damaged", 50, 51)
    else:
        some = [*texts[200:250], None, *texts[251:300]]
        pyarrow.parquet.write_table(pyarrow.table({"text": some}), paths[2])
        reason, kept, expected = "'text' must hold text (or a list of texts), not null", 99, ("schema", 1, 51)
    prepared_from(tmp_path / "bad", tmp_path / "out", share=0.5)
    clean = write_parquets(tmp_path / "clean", texts)
    left = [*texts[200:250], *texts[251:300]] if kind == "null" else texts[200 : 200 + kept]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(left, pyarrow.string())}), clean[2])
    prepared_from(tmp_path / "clean", tmp_path / "expected")
    assert tokens(tmp_path / "out") == tokens(tmp_path / "expected")
    (entry,) = entries(tmp_path / "out")
    assert entry["file"] == "2.parquet" and entry["reason"].startswith(reason)
    assert (entry["kind"], entry.get("records", 1), entry["row"]) == expected
    # Refused, it is the same fault in one line; and by default so many lost rows stop the job.
    with pytest.raises(UserError, match=r"2\.parquet.*: " + reason.split("(")[0].rstrip()):
        prepare(open_source([str(tmp_path / "bad")]), tmp_path / "no", PrepareSettings(ray=False, quiet=True))
    if entry.get("records", 1) > 1:
        with pytest.raises(UserError, match=r"the whole job: .* --max-bad-share 0\.01"):
            prepared_from(tmp_path / "bad", tmp_path / "stopped", share=0.01)


def test_a_parquet_that_holds_invalid_utf8_loses_that_row_alone(tmp_path: Path) -> None:
    column = pyarrow.array([b"one", b"tw\xff", b"three"]).cast(pyarrow.binary())
    raw = pyarrow.StringArray.from_buffers(3, column.buffers()[1], column.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "a.parquet")
    good, (bad,) = read(tmp_path / "a.parquet")
    assert good == ["one", "three"] and dict(bad.metadata)["row"] == "2"
    assert bad.fault == "not valid utf-8 (byte 0xff at position 2)"


def test_rows_of_a_hub_data_set_are_quarantined_too(tmp_path: Path, texts: list[str]) -> None:
    rows = [{"text": text} for text in texts[:20]]
    rows[3] = {"text": None}  # type: ignore[dict-item]
    rows[11] = {"text": "y" * 5000}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = HubData("json", data_files=(str(tmp_path / "a.jsonl"),), bad_records="quarantine")
    (part,) = HubSource("local", [(replace(data, max_record_bytes=4000), None)]).partitions()
    found = list(part.documents())
    assert [document.text for document in found if not document.fault] == [
        text for number, text in enumerate(texts[:20]) if number not in (3, 11)
    ]
    bad = [dict(document.metadata) for document in found if document.fault]
    assert [(entry["row"], entry["kind"]) for entry in bad] == [("4", "schema"), ("12", "too-long")]
    assert bad[0]["file"] == part.label
    assert (
        "bad_records"
        not in HubSource("l", [(replace(data, bad_records="refuse"), None)]).identity()["hub"][0]
    )
    (part,) = HubSource("local", [(replace(data, bad_records="refuse"), None)]).partitions()
    with pytest.raises(UserError, match=r"row 4: 'text' must hold text \(or a list of texts\), not null"):
        list(part.documents())


def test_the_threshold_holds_for_each_partition_and_for_the_job(
    tmp_path: Path, jsonl: Path, snapshot: Snapshot
) -> None:
    lines = jsonl.read_bytes().splitlines(keepends=True)
    path = tmp_path / "a.jsonl"
    lines[200:200] = [b"{broken\n"] * 3
    path.write_bytes(b"".join(lines))
    size = path.stat().st_size // 10 + 1
    with pytest.raises(
        UserError, match=r"partition a.jsonl\[.*: 3 of \d+ records are bad.*not valid JSON"
    ) as error:
        prepared_from(path, tmp_path / "out", share=0.05, partition_bytes=size)
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "manifest.json").exists()
    assert len(entries(tmp_path / "out")) == 3  # to be looked at
    prepared_from(path, tmp_path / "out", share=0.2, partition_bytes=size)
    prepared_from(path, tmp_path / "again", share=0.2, partition_bytes=size)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "again")
    # One bad record in each of ten partitions of 40: allowed there, too many for the job.
    lines = jsonl.read_bytes().splitlines(keepends=True)
    for number in range(5):
        lines[80 * number + 20] = b"{broken\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(
        UserError, match=r"the whole job: 5 of 400 records are bad, a share of 0\.0125; allowed"
    ):
        prepared_from(path, tmp_path / "job", share=0.01, partition_bytes=path.stat().st_size // 10 + 1)
    assert not (tmp_path / "job" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"max_bad_share = 1\.5: must be between 0 and 1"):
        prepared_from(path, tmp_path / "none", share=1.5)


def test_a_half_done_partition_is_repeated(tmp_path: Path, jsonl: Path, snapshot: Snapshot) -> None:
    lines = jsonl.read_bytes().splitlines(keepends=True)
    lines[100:100] = [b"{broken\n"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    out = tmp_path / "out"
    prepared_from(path, out, partition_bytes=10_000)
    expected = snapshot(out)
    (name,) = [path.name for path in out.glob("quarantine-*.jsonl")]
    for damage in (
        lambda: (out / name).unlink(),
        lambda: (out / name).write_bytes(b"torn"),
        lambda: (out / f"test-{name[11:16]}.json").unlink(),
        lambda: (out / "quarantine-00000.jsonl").write_bytes(b"stray"),
    ):
        (out / "manifest.json").unlink()
        damage()
        prepared_from(path, out, partition_bytes=10_000)
        assert snapshot(out) == expected
    # Another request clears all of it away.
    prepare(open_source([str(jsonl)]), out, PrepareSettings(ray=False, quiet=True, overwrite=True))
    assert not list(out.glob("quarantine*"))
    assert "quarantine" not in (out / "train-00000.json").read_text()


def test_cleaning_sees_no_bad_record_and_its_counts_are_kept(
    tmp_path: Path, jsonl: Path, snapshot: Snapshot
) -> None:
    lines = jsonl.read_bytes().splitlines(keepends=True)
    bad = [b"{broken\n", b'{"text": "\\udfff"}\n']
    for name, content in (("clean", lines), ("poisoned", [*lines[:90], *bad, *lines[90:]])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join([*content, lines[7]]))
        settings = PrepareSettings(
            ray=False, quiet=True, bad_records="quarantine", clean=CleanSettings(duplicates="exact")
        )
        source = open_source([str(tmp_path / f"{name}.jsonl")], bad_records="quarantine")
        prepare(source, tmp_path / name, settings)
    assert tokens(tmp_path / "poisoned") == tokens(tmp_path / "clean")
    assert load_manifest(tmp_path / "clean").totals("train").documents < 400
    assert [(entry["kind"], entry["line"]) for entry in entries(tmp_path / "poisoned")] == [
        ("json", 91),
        ("surrogate", 92),
    ]
    assert json.loads((tmp_path / "poisoned" / "quarantine.json").read_text())["records"] == 403
    expected = snapshot(tmp_path / "poisoned")
    (tmp_path / "poisoned" / "quarantine-00000.jsonl").unlink()
    prepare(source, tmp_path / "poisoned", settings)
    assert snapshot(tmp_path / "poisoned") == expected


def test_what_was_prepared_before_is_still_known(tmp_path: Path, jsonl: Path) -> None:
    prepare(open_source([str(jsonl)]), tmp_path / "out", PrepareSettings(ray=False, quiet=True))
    request = json.loads((tmp_path / "out" / "request.json").read_text())
    assert "bad_records" not in request and not {"bad_records", "max_record_bytes"} & set(request["source"])
    settings = PrepareSettings(ray=False, quiet=True, bad_records="quarantine")
    with pytest.raises(UserError, match=r"prepared otherwise \(bad_records, source differ\)"):
        prepare(open_source([str(jsonl)], bad_records="quarantine"), tmp_path / "out", settings)


def test_prepare_quarantines_by_command_line(
    tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl.read_bytes() + b'{"text": "' + b"q" * 2_000_000 + b'"}\n{"te')
    words = [
        "data",
        "prepare",
        "--source",
        str(path),
        "--output",
        str(tmp_path / "out"),
        "--no-ray",
        "--quiet",
    ]
    assert main(words) == 2
    assert "line 402: not valid JSON" in capsys.readouterr().err
    words += ["--overwrite", "--bad-records", "quarantine", "--max-record-mib", "1"]
    assert main(words) == 0
    assert "2 bad records of 402 (0.50%) left out: json 1, too-long 1; see" in capsys.readouterr().out
    assert main([*words[:-1], "0"]) == 2
    assert "--max-record-mib 0.0: must be positive" in capsys.readouterr().err
    assert main([*words, "--max-bad-share", "0.001"]) == 2
    assert load_manifest(tmp_path / "out").totals("train").documents > 300  # prepared before, kept
