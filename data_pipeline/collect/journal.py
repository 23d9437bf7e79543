"""Finished steps, one line each, beside the JSON lines they gave: work that can be killed at any moment.

`journal.log` has for each step `<checksum> {"key", "result", "end", "sha256"}`; a step that gave a record
names where its line in the JSON-lines file ends and that line's SHA-256. The record is written and
flushed before the step. What a kill left half-written at the end of either file is cut off when they
are opened again; anything else that does not fit is refused.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from spikescale.errors import UserError
from spikescale.files import fsync_folder, read_json, sweep_temporaries, write_json

REQUEST = "request.json"
LOG = "journal.log"
VERSION = 1


class Journal:
    """Steps by key; see the module. Use `open_journal`."""

    def __init__(self, log: IO[bytes], records: IO[bytes], names: tuple[str, str]) -> None:
        self._log, self._records = log, records
        self._names = names
        self._end = 0
        self._results: dict[str, Any] = {}
        self._load()

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __len__(self) -> int:
        return len(self._results)

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        """The result of the step, a JSON value: the one kept, or else that of `work()`, which is kept."""
        if key not in self._results:
            self.add(key, work())
        return self._results[key]

    def result(self, key: str) -> Any:
        """The result of a finished step."""
        return self._results[key]

    def add(self, key: str, result: Any, records: tuple[Mapping[str, Any], ...] = ()) -> None:
        """Note a step as finished, with the records that it gave."""
        if key in self._results:
            raise ValueError(f"{key}: was done before")
        lines = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
        if lines:
            _append(self._records, lines)
        step = {
            "key": key,
            "result": result,
            "end": self._end + len(lines),
            "sha256": hashlib.sha256(lines).hexdigest(),
        }
        described = json.dumps(step, ensure_ascii=False).encode()
        _append(self._log, _checksum(described) + b" " + described + b"\n")
        self._end += len(lines)
        self._results[key] = result

    def _load(self) -> None:
        self._log.seek(0)
        content = self._log.read()
        good = 0
        self._records.seek(0)
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            checksum, _, described = line.partition(b" ")
            if not line.endswith(b"\n") or _checksum(described[:-1]) != checksum:
                if good + len(line) == len(content):
                    break  # torn by a kill
                raise UserError(f"{self._names[0]}, line {number}: was changed; move the folder away")
            step = json.loads(described)
            record = self._records.read(step["end"] - self._end)
            if hashlib.sha256(record).hexdigest() != step["sha256"]:
                raise UserError(
                    f"{self._names[1]}: differs from what was written, after byte {self._end}; "
                    "move the folder away"
                )
            self._end = step["end"]
            self._results[step["key"]] = step["result"]
            good += len(line)
        self._log.truncate(good)
        self._log.seek(good)
        self._records.truncate(self._end)
        self._records.seek(self._end)


@contextlib.contextmanager
def open_journal(folder: Path, records: str, request: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of a folder whose JSON lines are in the file `records`.

    Raises UserError when another process works there, when the folder holds something else, or when
    what it holds was made by another `request`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror})") from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process writes there") from None
        sweep_temporaries(folder)
        wanted = {"version": VERSION, **request}
        earlier = earlier_request(folder)
        if earlier is None:
            if any(folder.iterdir()):
                raise UserError(f"{folder}: is not empty and holds no {REQUEST}; choose another")
            write_json(folder / REQUEST, wanted)
        elif earlier != wanted:
            keys = sorted(key for key in {*earlier, *wanted} if earlier.get(key) != wanted.get(key))
            raise UserError(
                f"{folder}: was begun with another request ({', '.join(keys)} differ); choose another folder"
            )
        for name in (LOG, records):
            (folder / name).touch()
        fsync_folder(folder)
        with (folder / LOG).open("r+b") as log, (folder / records).open("r+b") as lines:
            yield Journal(log, lines, (str(folder / LOG), str(folder / records)))
    finally:
        os.close(descriptor)


def earlier_request(folder: Path) -> dict[str, Any] | None:
    """The request that a folder was begun with; None for a folder without."""
    path = folder / REQUEST
    return dict(read_json(path)) if path.exists() else None


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:16].encode()


def _append(file: IO[bytes], content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
