"""Prepared data to and from remote storage: parallel, resumable, every file compared by its checksum.

A folder at a URL holds the files of the local one and `checksums.json`, which lists the size and SHA-256 of
each. The manifest comes last, in either direction, so that a half copy never looks whole. Begun again, a
transfer keeps the files that are right.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spikescale.data_pipeline.manifest import FILE as MANIFEST
from spikescale.data_pipeline.manifest import Manifest, load_manifest
from spikescale.data_pipeline.progress import TransferBar
from spikescale.data_pipeline.storage import (
    ATTEMPTS,
    DamagedObjectError,
    describe,
    is_url,
    open_filesystem,
    shown,
    with_retries,
)
from spikescale.errors import UserError
from spikescale.files import (
    TEMPORARY_PREFIX,
    read_json,
    room_needed,
    sha256_file,
    sweep_temporaries,
    written_aside,
)

CHECKSUMS = "checksums.json"
JOBS = 8
CHUNK = 1 << 20
# Where folders are part of the names and need not be made (and making one may make a bucket).
WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "hf", "http", "https"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A file of a data folder: its name relative to the folder, size in bytes, and SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Transferred:
    """What a transfer did: files and bytes that were copied, and files that were there already."""

    manifest: Manifest
    copied: int
    kept: int
    size_bytes: int


def push(
    folder: Path, url: str, jobs: int = JOBS, overwrite: bool = False, quiet: bool = False
) -> Transferred:
    """Copy prepared data to a URL, and read every file back to compare its checksum.

    Raises UserError for a folder that is not whole, a URL that holds other data (without `overwrite`), and
    storage that fails for good.
    """
    remote = RemoteFolder(url)
    manifest = load_manifest(folder, verify="full")
    entries = _local_entries(folder, manifest)
    last = next(entry for entry in entries if entry.name == MANIFEST)
    earlier = remote.read(MANIFEST)
    if earlier is not None and earlier != (folder / MANIFEST).read_bytes():
        if not overwrite:
            raise UserError(f"{remote}: holds another data set; choose another URL, or --overwrite")
        remote.remove(MANIFEST)
    listing = json.dumps({"version": 1, "files": [vars(entry) for entry in entries]}, indent=1).encode()
    with _bar("pushing", entries, quiet) as bar:
        results = _all(
            lambda entry: remote.send(folder / entry.name, entry, bar),
            [entry for entry in entries if entry is not last],
            jobs,
        )
        if remote.read(CHECKSUMS) != listing:
            remote.write(CHECKSUMS, listing)
        results.append(remote.send(folder / MANIFEST, last, bar))
    return _summed(manifest, entries, results)


def pull(url: str, folder: Path, jobs: int = JOBS, quiet: bool = False) -> Transferred:
    """Copy prepared data from a URL into `folder`, comparing every file's checksum before it gets its name.

    Raises UserError for a URL without whole data, a folder that holds something else, and storage that
    fails for good.
    """
    remote = RemoteFolder(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror})") from None
    with locked(folder, wait=False):
        return pull_locked(remote, folder, jobs, quiet)


def pull_locked(remote: "RemoteFolder", folder: Path, jobs: int, quiet: bool) -> Transferred:
    """`pull` into a folder that the caller has locked."""
    entries = remote.entries()
    last = next(entry for entry in entries if entry.name == MANIFEST)
    _check_target(folder, entries, last, remote)
    for inner in {folder, *((folder / entry.name).parent for entry in entries)}:
        inner.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(inner)
    with room_needed(folder), _bar("pulling", entries, quiet) as bar:
        results = _all(
            lambda entry: remote.receive(folder / entry.name, entry, bar),
            [entry for entry in entries if entry is not last],
            jobs,
        )
        results.append(remote.receive(folder / MANIFEST, last, bar))
    return _summed(load_manifest(folder, verify="size"), entries, results)


class RemoteFolder:
    """A folder of prepared data at a URL."""

    def __init__(self, url: str) -> None:
        if not is_url(url):
            raise UserError(f"{url}: is no URL; give one such as s3://bucket/folder")
        self.url = url.rstrip("/")
        self._filesystem, self._path = open_filesystem(self.url)

    def __str__(self) -> str:
        return shown(self.url)

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None when it is not there."""

        def attempt() -> bytes | None:
            try:
                return bytes(self._filesystem.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

        return with_retries(f"{self.url}/{name}", attempt)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file and read it back."""
        for _ in range(ATTEMPTS):
            with_retries(f"{self.url}/{name}", lambda: self._filesystem.pipe_file(self._at(name), content))
            if self.read(name) == content:
                return
        raise UserError(f"{self}/{name}: does not come back as it was written, {ATTEMPTS} times")

    def remove(self, name: str) -> None:
        """Remove a file."""
        with_retries(f"{self.url}/{name}", lambda: self._filesystem.rm_file(self._at(name)))

    def entries(self) -> list[Entry]:
        """What the folder holds. Raises UserError when it is not whole, or not made by `data push`."""
        for _ in range(ATTEMPTS):
            manifest, listing = self.read(MANIFEST), self.read(CHECKSUMS)
            if manifest is None or listing is None:
                name = MANIFEST if manifest is None else CHECKSUMS
                raise UserError(
                    f"{self}: holds no {name}: not (completely) written by `spikescale data push`"
                )
            try:
                entries = [_safe(Entry(**entry), self) for entry in json.loads(listing)["files"]]
            except (ValueError, KeyError, TypeError):
                continue
            found = {entry.name: entry.sha256 for entry in entries}
            if found.get(MANIFEST) == hashlib.sha256(manifest).hexdigest():
                return entries
        raise UserError(f"{self}: {MANIFEST} and {CHECKSUMS} do not belong together; push the data again")

    def send(self, path: Path, entry: Entry, bar: TransferBar) -> bool:
        """Write a file and compare what is there by its checksum. Whether it had to be written."""
        if self._size(entry.name) == entry.size and self._is_right(entry, bar):
            bar.done(entry.name)
            return False
        for attempt in range(1, ATTEMPTS + 1):
            with_retries(f"{self.url}/{entry.name}", lambda: self._put(path, entry.name))
            if self._is_right(entry, bar):
                bar.done(entry.name)
                return True
            logger.warning("%s/%s: checksum differs after upload %d", self, entry.name, attempt)
        raise UserError(f"{self}/{entry.name}: checksum differs after each of {ATTEMPTS} uploads")

    def receive(self, path: Path, entry: Entry, bar: TransferBar) -> bool:
        """Fetch a file, unless it is there, and compare it by its checksum. Whether it had to be fetched."""
        if path.exists() and path.stat().st_size == entry.size and sha256_file(path) == entry.sha256:
            bar.done(entry.name)
            return False
        for attempt in range(1, ATTEMPTS + 1):
            with contextlib.suppress(DamagedObjectError), written_aside(path) as temporary:
                with temporary.open("wb") as file:
                    found = self._checksum(entry, bar, file)
                if found != entry.sha256:
                    raise DamagedObjectError
                bar.done(entry.name)
                return True
            logger.warning("%s/%s: checksum differs after fetch %d", self, entry.name, attempt)
        raise UserError(
            f"{self}/{entry.name}: checksum differs after each of {ATTEMPTS} fetches; "
            f"expected sha256 {entry.sha256[:12]}..."
        )

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _size(self, name: str) -> int | None:
        def attempt() -> int | None:
            try:
                return int(self._filesystem.info(self._at(name))["size"])
            except FileNotFoundError:
                return None

        return with_retries(f"{self.url}/{name}", attempt)

    def _put(self, path: Path, name: str) -> None:
        protocol = self.url.split("://", 1)[0].lower()
        if protocol in ("file", "local"):
            target = Path(self._at(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(target) as temporary:
                shutil.copyfile(path, temporary)
            return
        if protocol not in WITHOUT_FOLDERS:
            self._filesystem.makedirs(self._at(name).rsplit("/", 1)[0], exist_ok=True)
        self._filesystem.put_file(str(path), self._at(name))

    def _is_right(self, entry: Entry, bar: TransferBar) -> bool:
        try:
            return self._checksum(entry, bar) == entry.sha256
        except DamagedObjectError:
            return False

    def _checksum(self, entry: Entry, bar: TransferBar, copy: Any = None) -> str:
        """Of the remote file, read from its start; the bytes go into `copy` on the way."""
        bar.restart(entry.name)
        digest = hashlib.sha256()
        with describe(f"{self.url}/{entry.name}").open(fresh=True) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                bar.advance(entry.name, len(chunk))
                if copy is not None:
                    copy.write(chunk)
        return digest.hexdigest()


def _bar(title: str, entries: Sequence[Entry], quiet: bool) -> TransferBar:
    return TransferBar(title, {entry.name: entry.size for entry in entries}, quiet)


def _local_entries(folder: Path, manifest: Manifest) -> list[Entry]:
    known: dict[Path, str] = {}
    for shards in manifest.splits.values():
        for shard in shards:
            known[shard.path], known[shard.index_path] = shard.bin_sha256, shard.idx_sha256
    entries = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != CHECKSUMS and not any(part.startswith(".") for part in name.split("/")):
            entries.append(Entry(name, path.stat().st_size, known.get(path) or sha256_file(path)))
    return entries


def _safe(entry: Entry, remote: RemoteFolder) -> Entry:
    path = PurePosixPath(entry.name)
    if path.is_absolute() or ".." in path.parts or path.name.startswith(TEMPORARY_PREFIX):
        raise UserError(f"{remote}/{CHECKSUMS}: refuses the name {entry.name!r}, which points outside")
    if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256) or not isinstance(entry.size, int):
        raise ValueError(entry.name)
    return entry


def _check_target(folder: Path, entries: Sequence[Entry], last: Entry, remote: RemoteFolder) -> None:
    """Make sure that the folder is empty, or holds a whole or half copy of these very data."""
    path = folder / MANIFEST
    if path.exists():
        if sha256_file(path) == last.sha256:
            return
        described = read_json(path)
        if isinstance(described, dict) and "sha256" in described:
            raise UserError(f"{folder}: holds another data set than {remote}; choose another folder")
        path.unlink()  # damaged, or a name that is not whole: it is fetched again
    names = {part for entry in entries for part in (entry.name, *map(str, PurePosixPath(entry.name).parents))}
    for found in folder.rglob("*"):
        name = found.relative_to(folder).as_posix()
        if name not in names and not found.name.startswith(TEMPORARY_PREFIX):
            raise UserError(f"{folder}: holds {name}, which is not of {remote}; choose another folder")


def _all(work: Callable[[Entry], bool], entries: Sequence[Entry], jobs: int) -> list[bool]:
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        futures = [pool.submit(work, entry) for entry in entries]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _summed(manifest: Manifest, entries: Sequence[Entry], results: Sequence[bool]) -> Transferred:
    return Transferred(
        manifest=manifest,
        copied=sum(results),
        kept=len(results) - sum(results),
        size_bytes=sum(entry.size for entry in entries),
    )


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Keep other transfers out of a folder; `wait` for one that is there, or raise UserError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another command is writing there") from None
    finally:
        os.close(descriptor)
