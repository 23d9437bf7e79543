"""Taking chosen files out of an archive: tar, zip (wheels) and Debian packages."""

import contextlib
import fnmatch
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from spikescale.errors import UserError
from spikescale.files import cache_folder


def extract_cached(archive: Path, pattern: str, key: str) -> Path:
    """A cache folder holding the members of `archive` whose name matches the glob `pattern`.

    `key` identifies the archive's content (its checksum). The folder appears under its final name
    only when it is whole.
    """
    digest = hashlib.sha256(f"{key} {pattern}".encode()).hexdigest()[:16]
    target = cache_folder("extracted") / digest
    if target.is_dir():
        return target
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".tmp-"))
    try:
        count = 0
        for name, content in members(archive):
            if fnmatch.fnmatchcase(name, pattern):
                path = work / _safe(name, archive)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                count += 1
        if count == 0:
            raise UserError(f"{archive}: no member matches {pattern!r}")
        with contextlib.suppress(FileExistsError):
            # Another process may have finished the same extraction meanwhile.
            if not target.exists():
                work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every regular file. Links, devices and folders are passed over.

    The kind of archive is told by its first bytes, not by its name.
    """
    with archive.open("rb") as file:
        magic = file.read(8)
    try:
        if magic.startswith(b"PK"):
            with zipfile.ZipFile(archive) as content:
                for entry in content.infolist():
                    if not entry.is_dir():
                        yield entry.filename, content.read(entry)
        elif magic.startswith(b"!<arch>"):
            yield from _deb_members(archive)
        else:
            with tarfile.open(archive) as content:
                yield from _tar_members(content)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive}: damaged archive ({error})") from None


def _deb_members(archive: Path) -> Iterator[tuple[str, bytes]]:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as content:
            yield from _tar_members(content)
        assert process.stdout is not None
        process.stdout.read()
    if process.returncode != 0:
        raise UserError(f"{archive}: dpkg-deb could not read it (exit code {process.returncode})")


def _tar_members(content: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for entry in content:
        if entry.isfile():
            file = content.extractfile(entry)
            assert file is not None
            yield entry.name.removeprefix("./"), file.read()


def _safe(name: str, archive: Path) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{archive}: refuses the member {name!r}, which points outside")
    return Path(*path.parts)
