"""What the machine must have for these tests, and what happens where it does not."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest


def skip_or_fail(reason: str) -> None:
    """Skip, saying why. Where CI runs as root on Debian all can be installed: there it is a failure."""
    if os.environ.get("CI") and os.geteuid() == 0 and Path("/etc/debian_version").exists():
        pytest.fail(reason)
    pytest.skip(reason)


def require_programs(packages: Mapping[str, str]) -> None:
    """Skip (in CI: fail) unless every program of {program: Debian package} is installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = sorted({package for name, package in packages.items() if not shutil.which(name, path=path)})
    if missing:
        skip_or_fail(f"not installed: {', '.join(missing)} (as root on Debian: tests/distributed/install.sh)")
