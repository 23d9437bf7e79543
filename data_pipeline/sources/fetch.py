"""Fetching a package by its registry's ordinary client, checked against a known SHA-256 and cached.

Nothing of a package is imported or installed. pip checks the hash before it reads an sdist's
metadata; npm and apt-get only download.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from spikescale.errors import UserError
from spikescale.files import cache_folder, fsync_file, sha256_file

TIMEOUT_SECONDS = 1800


class Package(BaseModel):
    """A file in a package registry.

    Attributes:
        tool: `pip` (source distribution), `pip-wheel`, `npm` or `apt`.
        package: the package's name there; version: the exact version.
        sha256: of the downloaded file; bytes: its size.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tool: Literal["pip", "pip-wheel", "npm", "apt"]
    package: str
    version: str
    sha256: str
    bytes: int

    @property
    def program(self) -> str:
        """The command-line program that fetches it."""
        return {"npm": "npm", "apt": "apt-get"}.get(self.tool, "pip")


def fetch(package: Package) -> Path:
    """The path of the package's file in the cache, downloaded when it is not there yet.

    Raises UserError when the tool is missing or fails, or the content is not the expected one.
    """
    folder = cache_folder("downloads")
    cached = folder / f"{package.sha256[:16]}-{package.package.strip('@').replace('/', '-')}"
    if cached.exists() and sha256_file(cached) == package.sha256:
        return cached
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as work:
        _run(package, Path(work))
        files = [path for path in Path(work).iterdir() if path.name != "requirement.txt"]
        if len(files) != 1:
            raise UserError(f"{package.package}: {package.program} left {len(files)} files where one was due")
        found = sha256_file(files[0])
        if found != package.sha256:
            raise UserError(
                f"{package.package}=={package.version}: sha256 is {found}, expected {package.sha256}"
            )
        fsync_file(files[0])
        files[0].replace(cached)
    return cached


def _run(package: Package, work: Path) -> None:
    command = _command(package, work)
    what = f"{package.package} {package.version}"
    try:
        finished = subprocess.run(
            command, cwd=work, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{what}: {package.program} did not finish in {TIMEOUT_SECONDS} s") from None
    if finished.returncode != 0:
        if "No module named pip" in finished.stderr:
            raise UserError(f"{what}: needs pip in {sys.executable}: run `python -m ensurepip`")
        lines = [line.strip() for line in (finished.stderr or finished.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or line.startswith("E:")]
        reason = (errors or lines or ["no message"])[-1]
        raise UserError(f"{what}: {package.program} could not fetch it ({reason})")


def _command(package: Package, work: Path) -> list[str]:
    if package.tool == "npm":
        _require_program("npm", package, "install Node.js")
        return ["npm", "pack", f"{package.package}@{package.version}", "--silent", "--ignore-scripts"]
    if package.tool == "apt":
        _require_program("apt-get", package, "it exists on Debian and its kin only")
        _require_program("dpkg-deb", package, "it exists on Debian and its kin only")
        return ["apt-get", "download", "-q", f"{package.package}={package.version}"]
    requirement = work / "requirement.txt"
    requirement.write_text(
        f"{package.package}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8"
    )
    kind = "--no-binary" if package.tool == "pip" else "--only-binary"
    options = ["--no-deps", kind, ":all:", "--require-hashes", "--no-build-isolation"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "download", *quiet, *options, "-d", ".", "-r", str(requirement)]


def _require_program(program: str, package: Package, advice: str) -> None:
    if shutil.which(program) is None:
        raise UserError(f"{package.package}: needs the program {program}, which is not there: {advice}")
