"""Remote storage by URL, through fsspec: listing, ranged reading and writing, with retries.

One policy for every protocol: what may pass (a 500, a 503, a cut or silent connection) is tried again
after a growing pause; what will not (no such file, no access) is one clear line at once. Reads are byte
ranges, so that a connection cut in the middle costs one range, not the file. Credentials come from where
the protocol's own library looks (environment, standard files); URLs are shown without user names,
passwords and queries.
"""

import io
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from spikescale.errors import UserError

ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
FIRST_RANGE = 256 << 10  # bytes of a read after a jump; each that follows on is twice as long
LONGEST_RANGE = 8 << 20

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "Digest"),
    *("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created"),
)

CHECKSUM_ATTEMPTS = 3  # an object that differs so often in a row differs where it is stored

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class DamagedObjectError(UserError):
    """What is stored does not have the checksum that the storage keeps with it."""


def is_url(text: str) -> bool:
    """Whether `text` names something by a protocol, such as `s3://bucket/key`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def local_path(url: str) -> Path | None:
    """The path that a `file://` URL stands for; None for any other protocol."""
    if not url.lower().startswith("file://"):
        return None
    return Path(open_filesystem(url)[1])


def shown(text: str) -> str:
    """`text` with what may be secret in its URLs left out: users, passwords and queries."""
    text = re.sub(r"(://)[^/\s@]*@", r"\1", text)
    return re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", text)


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises UserError for an unknown protocol, and for one whose package is not installed.
    """
    import fsspec

    protocol = url.split("://", 1)[0].lower()
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": 20,
            "read_timeout": 60,
        }
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install 'spikescale[{extra}]'" if extra else " ".join(str(error).split())
        raise UserError(f"{shown(url)}: the package for {protocol}:// is not installed: {remedy}") from None
    except ValueError as error:
        raise UserError(f"{shown(url)}: {' '.join(str(error).split())}") from None
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1  # s3fs and gcsfs would otherwise multiply our attempts by theirs
    return filesystem, path


def with_retries(what: str, action: Callable[[], Result]) -> Result:
    """What `action()` returns; called again, after a pause, when it fails in a way that may pass.

    Raises UserError, beginning with `what`, for a failure that stays.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            reason = shown(" ".join(str(error).split()))[:200] or type(error).__name__
            if type(error).__name__ == "FlexibleChecksumError" and attempt >= CHECKSUM_ATTEMPTS:
                raise DamagedObjectError(f"{shown(what)}: its stored checksum differs ({reason})") from None
            permanent = _permanent(error)
            if permanent is not None:
                raise UserError(f"{shown(what)}: {permanent} ({reason})") from None
            if attempt == ATTEMPTS:
                raise UserError(f"{shown(what)}: gave up after {ATTEMPTS} attempts ({reason})") from None
            pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            pause *= random.uniform(0.5, 1.0)  # so that many workers do not come back at once
            logger.warning("%s: %s; trying again in %.1f s", shown(what), reason, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _permanent(error: Exception) -> str | None:
    """Why trying again is of no use; None where it may be."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp"):
        # fsspec says so of every failure of a web server; its cause tells which it was.
        assert isinstance(cause, Exception)
        return _permanent(cause)
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, PermissionError):
        return "access refused; check the credentials"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return "no credentials found"
    if isinstance(error, (ImportError, TypeError, ValueError, NotImplementedError)):
        return "cannot be used"
    status = getattr(error, "status", None)
    if status in (404, 410):
        return "no such file or folder"
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return f"the server answered {status}"
    return None


@dataclass(frozen=True)
class RemoteFile:
    """A file known by its URL. It stands where readers take a path.

    Attributes:
        size: bytes.
        version: entity tag, checksum or time of modification: whatever the storage tells.
    """

    url: str
    size: int
    version: str

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        """The last part of the URL's path."""
        path = self.url if not self.url.startswith("http") else self.url.split("?", 1)[0].split("#", 1)[0]
        return path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """As of a path."""
        return PurePosixPath(self.name).suffix

    def open(self, mode: str = "rb", fresh: bool = False) -> io.BufferedReader:
        """A seekable reader of the bytes. Raises UserError when the file is another one by now.

        `fresh`: it was described just now, and need not be looked up again.
        """
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: a remote file is only read")
        return io.BufferedReader(RangeReader(self, fresh), FIRST_RANGE)


class RangeReader(io.RawIOBase):
    """Reads a remote file in ranges, each tried again by itself: short after a jump, longer in a row."""

    def __init__(self, file: RemoteFile, fresh: bool) -> None:
        self._file = file
        self._filesystem, self._path = open_filesystem(file.url)
        self._position = 0
        self._block = b""
        self._block_start = 0
        self._length = FIRST_RANGE
        if not fresh:
            self._check_version()

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, without reading."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} is before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, or as much of it as one range gives; 0 at the end."""
        wanted = min(len(buffer), self._file.size - self._position)
        if wanted <= 0:
            return 0
        begin = self._position - self._block_start
        if not 0 <= begin < len(self._block):
            in_a_row = self._position == self._block_start + len(self._block)
            self._length = min(LONGEST_RANGE, self._length * 2) if in_a_row else FIRST_RANGE
            end = min(self._file.size, self._position + max(self._length, min(wanted, LONGEST_RANGE)))
            self._block = self._fetch(self._position, end)
            self._block_start, begin = self._position, 0
        part = self._block[begin : begin + wanted]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _fetch(self, start: int, stop: int) -> bytes:
        failed = False

        def attempt() -> bytes:
            nonlocal failed
            if failed:
                self._check_version()
            failed = True
            content = bytes(self._filesystem.cat_file(self._path, start=start, end=stop))
            if len(content) == stop - start:
                return content
            if len(content) == self._file.size:
                if self._file.size > LONGEST_RANGE:
                    raise UserError(f"{self._file}: its server gives no byte ranges; fetch the file first")
                return content[start:stop]
            raise OSError(f"{len(content)} bytes came where {stop - start} were asked for")

        return with_retries(str(self._file), attempt)

    def _check_version(self) -> None:
        found = describe(self._file.url)
        if (found.size, found.version) != (self._file.size, self._file.version):
            raise UserError(f"{self._file}: was changed while it was being read; begin again")


def describe(url: str) -> RemoteFile:
    """Size and version of the file at a URL. Raises UserError when it is not there, or tells no size."""
    filesystem, path = open_filesystem(url)
    return _remote_file(url, with_retries(url, lambda: filesystem.info(path)))


def _remote_file(url: str, info: dict[str, Any]) -> RemoteFile:
    if info.get("type") == "directory":
        raise UserError(f"{shown(url)}: is a folder, not a file")
    if info.get("size") is None:
        raise UserError(f"{shown(url)}: its server does not tell the length; fetch the file first")
    version = next((str(info[key]) for key in VERSION_KEYS if info.get(key)), "")
    return RemoteFile(url, int(info["size"]), version)


def list_files(url: str) -> list[tuple[RemoteFile, str]]:
    """The files that a URL, a glob (`*`, `**`, `[...]`) or a folder stands for, in the order of their names.

    Each comes with a name relative to what was given. Raises UserError when there are none.
    """
    filesystem, path = open_filesystem(url)
    web = url.lower().startswith("http")  # where a question mark begins a query
    if re.search(r"[*\[]" if web else r"[*?\[]", path):
        found = with_retries(url, lambda: filesystem.glob(path, detail=True))
        files = [(name, info, name.rsplit("/", 1)[-1]) for name, info in _plain_files(found)]
        if not files:
            raise UserError(f"{shown(url)}: no file matches")
    else:
        info = with_retries(url, lambda: filesystem.info(path))
        if info.get("type") != "directory":
            file = _remote_file(url, info)
            return [(file, file.name)]
        found = with_retries(url, lambda: filesystem.find(path, detail=True))
        base = path.rstrip("/") + "/"
        files = [(name, info, name.removeprefix(base)) for name, info in _plain_files(found)]
        files = [entry for entry in files if not any(part.startswith(".") for part in entry[2].split("/"))]
        if not files:
            raise UserError(f"{shown(url)}: the folder is empty")
    listed = []
    for name, info, relative in files:
        address = filesystem.unstrip_protocol(name)
        file = describe(address) if web or info.get("size") is None else _remote_file(address, info)
        listed.append((file, relative))
    return listed


def _plain_files(found: Any) -> list[tuple[str, dict[str, Any]]]:
    return sorted((name, info) for name, info in dict(found).items() if info.get("type") != "directory")
