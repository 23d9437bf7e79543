"""What a run must remember of where it ran, so that it can be repeated."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from spikescale import __version__

PACKAGES = ("torch", "deepspeed", "megatron-core", "ray", "mlflow", "triton", "numpy")


def describe_environment() -> dict[str, str]:
    """Versions, processor and devices, and the commit of the source tree if there is one."""
    described = {
        "spikescale": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "devices": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        or f"CPU, {torch.get_num_threads()} threads a rank",
        "commit": git_commit(),
    }
    for package in PACKAGES:
        try:
            described[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            described[package] = "not installed"
    return described


def processor_name() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def git_commit() -> str:
    """The commit of the source tree this package runs from, `+changes` if it was edited, else `unknown`."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown (installed from a wheel)"
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown (git failed)"


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()
