"""Lines out of bytes, wherever reads and ranges cut them; JSON lines, whichever parser takes them."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spikescale.data_pipeline.sources import ReadOptions, readers, streams
from spikescale.data_pipeline.sources.base import EXCERPT_BYTES, Document
from spikescale.data_pipeline.sources.readers import read_jsonl
from spikescale.data_pipeline.sources.streams import Line, read_lines
from spikescale.data_pipeline.split import SplitSettings, split_of
from spikescale.errors import UserError

QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
CONTENT = st.lists(st.sampled_from([b"\n", b"a", b"bc\n", b"d" * 5, b"e" * 250]), max_size=12).map(b"".join)


def lines_by_hand(content: bytes, start: int, stop: int | None, longest: int | None) -> list[Line]:
    found, offset = [], 0
    for line in content.split(b"\n")[: -1 if content.endswith(b"\n") or not content else None]:
        if offset >= start and (stop is None or offset < stop):
            kept = line if longest is None or len(line) <= longest else line[:EXCERPT_BYTES]
            found.append(Line(len(found), kept, offset, len(line)))
        offset += len(line) + 1
    return found


@QUIET
@given(
    content=CONTENT, chunk=st.integers(1, 12), start=st.integers(0, 40), longest=st.sampled_from([None, 3])
)
@example(content=b"a\nb\n", chunk=2, start=2, longest=None)
def test_lines_are_the_same_however_the_file_is_read(
    content: bytes,
    chunk: int,
    start: int,
    longest: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "CHUNK", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    start = min(start, len(content))
    for stop in (None, start, start + 1, start + 3, start + 10, len(content)):
        expected = lines_by_hand(content, start, stop, longest)
        if stop is None or stop > start:
            assert list(read_lines(path, start, stop, longest)) == expected


# Taken by json and not by orjson, the other way round, by both, by neither; and what holds no text.
RECORDS = [
    b'{"text": "plain"}',
    b'{"text": ["a", "b"]}',
    b'{"text": 1}',
    b'{"text": null}',
    b'{"n": 1}',
    b"[1]",
    b'"text"',
    b"1",
    b"null",
    b"",
    b"   ",
    b"\t\r",
    b'{"text": "cr"}\r',
    b'{"text": "a", "n": NaN}',
    b'{"text": "a", "n": 1e999}',
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"text": "a", "n": 18446744073709551616}',
    b'{"text": "\\ud800"}',
    b'{"text": "\xff"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "a\x01b"}',
    b'{"text": "\\u0000 \\ud83d\\ude00"}',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "a"} b',
    b'{"text": "a",}',
    b'{"text": "a", "text": "b"}',
    b'{"text": ""}',
    b'{"text": "a", "b": ' + b"[" * 1500 + b"]" * 1500 + b"}",
    b"{'text': 'a'}",
    b'{"text": "a"',
    '{"text": "é"}'.encode(),
]


@pytest.mark.parametrize("bad_records", ["refuse", "quarantine"])
@pytest.mark.parametrize("invalid_bytes", ["refuse", "replace"])
@pytest.mark.parametrize("chunk", [50, 1 << 20])
def test_json_lines_are_the_same_by_either_parser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_records: str, invalid_bytes: str, chunk: int
) -> None:
    monkeypatch.setattr(streams, "CHUNK", chunk)
    options = ReadOptions(bad_records=bad_records, invalid_bytes=invalid_bytes)
    if bad_records == "quarantine":
        options = ReadOptions(**{**vars(options), "max_record_bytes": 2000})
    taken: list[bytes] = []
    real = readers.orjson.loads
    monkeypatch.setattr(readers.orjson, "loads", lambda line: (real(line), taken.append(line))[0])

    def documents(path: Path, plain: bool) -> list[Document] | str:
        with monkeypatch.context() as patch:
            if not plain:
                patch.setattr(readers, "_plain_texts", lambda lines, key: [None] * len(lines))
            try:
                return list(read_jsonl(path, options))
            except UserError as error:
                return str(error)

    good = []
    for number, record in enumerate(RECORDS):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(b'{"text": "before"}\n' + record + b'\n{"text": "after"}\n')
        fast = documents(path, plain=True)
        assert fast == documents(path, plain=False), record
        if isinstance(fast, list) and not any(document.fault for document in fast):
            good.append(b'{"text": "x"}\n' + record)
    everything = tmp_path / "all.jsonl"
    everything.write_bytes(b"\n".join(good if bad_records == "refuse" else RECORDS))
    found = documents(everything, plain=True)
    assert isinstance(found, list) and found == documents(everything, plain=False)
    assert len(found) > 2 * len(good) - 8 and (chunk == 50 or b'{"text": "plain"}' in taken)


def test_messages_of_bad_lines_name_their_place_among_plain_ones(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"é{number}"}, ensure_ascii=False).encode() for number in range(9)]
    lines[4] = b"{broken"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    (bad,) = (
        document for document in read_jsonl(path, ReadOptions(bad_records="quarantine")) if document.fault
    )
    assert dict(bad.metadata)["offset"] == str(sum(len(line) + 1 for line in lines[:4]))
    assert dict(bad.metadata)["line"] == "5"


@given(digest=st.binary(min_size=32, max_size=32), test=st.floats(0, 0.49), valid=st.floats(0, 0.49))
@example(digest=bytes(32), test=0.0, valid=0.0)
@example(digest=b"\xff" * 32, test=0.25, valid=0.25)
@example(digest=b"\x40" + bytes(31), test=0.25, valid=0.25)
@example(digest=b"\x3f" + b"\xff" * 31, test=0.25, valid=0.25)
def test_the_split_is_the_place_of_the_digest_between_0_and_1(
    digest: bytes, test: float, valid: float
) -> None:
    place = int.from_bytes(digest[:8], "big") / 2**64
    expected = "test" if place < test else "valid" if place < test + valid else "train"
    assert split_of(digest, SplitSettings(valid_fraction=valid, test_fraction=test)) == expected
