"""Files that are whole or absent: written aside, flushed to disk, renamed into place.

Everything the project writes for later reading (shards, manifests, checkpoints, exports) goes
through these functions, so that a kill or a full disk never leaves a half-written file under a
name that looks finished.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spikescale.errors import UserError

TEMPORARY_PREFIX = ".tmp-"


def temporary_path(path: Path) -> Path:
    """The name, in the folder of `path` and private to this process, under which it is written aside."""
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, flush it and rename it to `path`.

    When the block fails, the temporary file is removed and `path` is left as it was.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def room_needed(folder: Path) -> Iterator[None]:
    """A full disk, quota or file size met in the block becomes a UserError, one line naming `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{folder}: writing failed ({error.strerror}); make room and run the same command again: "
                "what is finished is kept"
            ) from None
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    with written_aside(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` of the UTF-8 encoding of `content`."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """`write_text` of `content` as indented JSON with sorted keys (the same content, the same bytes)."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def fsync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """The SHA-256 of the UTF-8 encoding of `text`, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sweep_temporaries(folder: Path) -> list[Path]:
    """Remove what interrupted writers left in `folder`, and return the paths that were removed.

    Call it only when no other process writes there.
    """
    removed = []
    if folder.is_dir():
        for path in sorted(folder.glob(TEMPORARY_PREFIX + "*")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def cache_folder(*parts: str) -> Path:
    """A folder, made if need be, for what can be fetched or built again: `$XDG_CACHE_HOME/spikescale`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base, "spikescale", *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
