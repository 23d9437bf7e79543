"""Compiling one C++ file into a shared library, once per source, compiler and kind of CPU.

The sources include no torch headers and export a C interface, so they compile in seconds and are
bound with ctypes. The library lands in the cache folder, written aside under a lock: any number of
processes may ask for it at the same time, and one of them builds it.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from spikescale import files
from spikescale.errors import UserError

COMPILERS = ("g++", "c++")
# No -ffast-math and no -ffinite-math-only: NaN and infinity must come out as such. No contraction: a
# fused multiply-add rounds differently from the reference and would move spikes.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp",
)
# From the widest to the one that runs everywhere, each with its flags and the features it needs.
INSTRUCTION_SETS = {
    "avx512": (
        ("-march=x86-64-v4", "-mprefer-vector-width=512"),
        {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma"},
    ),
    "avx2": (("-march=x86-64-v3",), {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}),
    "plain": ((), set()),
}
INCLUDE = Path(__file__).parent / "include"

logger = logging.getLogger("spikescale.kernels")


class BuildError(UserError):
    """A kernel could not be compiled; the message carries the compiler's first complaint."""


def find_compiler(compiler: str | None = None) -> str:
    """The path of `compiler`, or of the first of g++, c++ that is on the PATH."""
    candidates = (compiler,) if compiler else COMPILERS
    for name in candidates:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: {', '.join(candidates)} not found on the PATH; install g++")


def refuse_clang(path: str) -> None:
    """Raise BuildError if the compiler is clang, whatever it is called."""
    if "clang" in _version(path):
        # Its threads need LLVM's OpenMP library, and two such libraries are two competing teams of threads.
        raise BuildError(f"{path} is clang, whose OpenMP library torch has not loaded; install g++")


def instruction_sets() -> tuple[str, ...]:
    """Those of INSTRUCTION_SETS that this processor has, the widest first; the last is "plain"."""
    features = _cpu_features()
    return tuple(name for name, (_, needed) in INSTRUCTION_SETS.items() if needed <= features)


def load(source: Path, instruction_set: str = "plain", compiler: str | None = None) -> ctypes.CDLL:
    """`build` and open the library. Raises BuildError."""
    library = build(source, instruction_set, compiler)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library}: built, but cannot be loaded ({error})") from None


def build(source: Path, instruction_set: str = "plain", compiler: str | None = None) -> Path:
    """The library that GCC makes of `source` (one .cpp file, with `kernels/include` to include from).

    `instruction_set` is a key of INSTRUCTION_SETS. Compiled at most once per content of the sources,
    flags, compiler version and kind of machine; the result is a file in
    `files.cache_folder("kernels", ...)`. Raises BuildError.
    """
    path = find_compiler(compiler)
    refuse_clang(path)
    try:
        return _build(source, (*FLAGS, *INSTRUCTION_SETS[instruction_set][0]), path)
    except OSError as error:
        raise BuildError(
            f"{source.parent.name}/{source.name}: the library cannot be written ({error})"
        ) from None


def _build(source: Path, flags: tuple[str, ...], path: str) -> Path:
    folder = files.cache_folder("kernels", f"{source.parent.name}-{_fingerprint(source, flags, path)}")
    library = folder / f"{source.stem}.so"
    if library.exists():
        return library
    with (folder / "lock").open("w") as lock:
        # Released by the system when the holder ends, however it ends: a killed build blocks nobody.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            logger.info("compiling %s with %s", source.name, path)
            with files.written_aside(library) as temporary:
                _compile(source, flags, path, temporary)
    return library


def _compile(source: Path, flags: tuple[str, ...], compiler: str, target: Path) -> None:
    objects = target.with_suffix(".o")
    try:
        _run([compiler, *flags, f"-I{INCLUDE}", "-c", str(source), "-o", str(objects)], source)
        _run([compiler, "-shared", str(objects), *_openmp_libraries(), "-o", str(target)], source)
    finally:
        objects.unlink(missing_ok=True)


def _run(command: list[str], source: Path) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: cannot be run ({error})") from None
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        complaint = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise BuildError(f"{source.parent.name}/{source.name}: {command[0]} failed: {complaint}")


def _openmp_libraries() -> list[str]:
    """What to link for OpenMP: the very library torch has loaded, so that both share one thread pool."""
    bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    bundled += sorted(Path(torch.__file__).parent.parent.glob("torch.libs/libgomp*.so*"))
    return [str(bundled[0])] if bundled else ["-lgomp"]


def _fingerprint(source: Path, flags: tuple[str, ...], compiler: str) -> str:
    parts = [_version(compiler), platform.machine(), " ".join(flags), *_openmp_libraries()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for path in _with_includes(source):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _with_includes(source: Path) -> list[Path]:
    """`source` and every header of ours that it includes, directly or not."""
    found, waiting = [], [source]
    while waiting:
        path = waiting.pop()
        found.append(path)
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            header = next(
                (folder / name for folder in (path.parent, INCLUDE) if (folder / name).exists()), None
            )
            if header and header not in (*found, *waiting):
                waiting.append(header)
    return found


@functools.cache
def _version(compiler: str) -> str:
    try:
        result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{compiler}: cannot be run ({error})") from None
    return result.stdout


@functools.cache
def _cpu_features() -> frozenset[str]:
    """What /proc/cpuinfo lists; empty where it does not exist."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(listed.partition(":")[2].split())
