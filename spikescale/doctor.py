"""What this machine has, and what to do about what it lacks."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spikescale import files

GIB = 2**30
LOW_DISK = 10 * GIB  # less free space is worth a word
MLFLOW_TIMEOUT = 5.0  # seconds
FRESH_LOCK = 600.0  # seconds; a build that is really running may hold its lock this long


@dataclass(frozen=True)
class Check:
    """One line of the report. `remedy` says what to do about what is missing or worth noting."""

    name: str
    status: Literal["ok", "missing", "note"]
    detail: str
    remedy: str = ""
    required: bool = False

    @property
    def failed(self) -> bool:
        """Whether training cannot run because of this."""
        return self.required and self.status == "missing"


def examine(mlflow_uri: str | None = None, deep: bool = False) -> list[Check]:
    """Run all checks. `deep` also imports DeepSpeed and starts a local Ray, which takes up to a minute."""
    groups: list[Callable[[], list[Check]]] = [
        _python,
        _torch,
        _cpu,
        _gpus,
        _compiler,
        _kernels,
        lambda: _packages(deep),
        lambda: [_mlflow_store(mlflow_uri)],
        _programs,
        _disk,
        _build_locks,
    ]
    checks = []
    for group in groups:
        try:
            checks += group()
        except Exception as error:  # a broken installation must not hide the other lines
            name = getattr(group, "__name__", "check").strip("_<>")
            checks.append(
                Check(name, "missing", f"check failed: {_one_line(error)}", "reinstall: make distclean venv")
            )
    return checks


def _python() -> list[Check]:
    version, good = platform.python_version(), sys.version_info >= (3, 10)
    checks = [
        Check(
            "Python",
            "ok" if good else "missing",
            f"{version}, {sys.executable}",
            "" if good else "install Python 3.10 or newer",
            required=True,
        )
    ]
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        remedy = "only DeepSpeed's compiled optimizers need them (Debian: apt-get install python3-dev)"
        checks.append(Check("Python headers", "note", "no Python.h", remedy))
    return checks


def _torch() -> list[Check]:
    version = _version("torch")
    if version is None:
        return [Check("torch", "missing", "not installed", "make venv", required=True)]
    import torch

    build = "CUDA " + torch.version.cuda if torch.version.cuda else "CPU build"
    return [Check("torch", "ok", f"{version}, {build}, {torch.get_num_threads()} threads", required=True)]


def _cpu() -> list[Check]:
    import torch

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    simd = torch.backends.cpu.get_cpu_capability()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return [Check("CPU", "ok", f"{model}, {cores} cores, SIMD {simd}, {memory:.1f} GiB memory")]


def _gpus() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            remedy = "a GPU is here, but torch cannot use it: make distclean, then make venv DEVICE=cuda"
        else:
            remedy = "nothing to do: training runs on the CPU"
        return [Check("GPU", "note", "none that torch can use", remedy)]
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        Check(f"GPU {index}", "ok", f"{device.name}, {device.total_memory / GIB:.1f} GiB")
        for index, device in enumerate(devices)
    ]


def _compiler() -> list[Check]:
    from spikescale.kernels.build import BuildError, find_compiler, refuse_clang

    try:
        path = find_compiler()
        refuse_clang(path)
    except BuildError as error:
        remedy = "without one the kernels run as slow reference code (Debian: apt-get install g++)"
        return [Check("C++ compiler", "missing", _one_line(error), remedy)]
    return [Check("C++ compiler", "ok", f"{path}, {_first_line([path, '--version'])}")]


def _kernels() -> list[Check]:
    """Run each backend of each operator, forward and backward, and compare it with the reference."""
    import torch

    from spikescale.kernels import self_check
    from spikescale.kernels.build import instruction_sets

    backends = {f"cpu-{name}": "cpu" for name in instruction_sets()}
    if torch.cuda.is_available():
        backends["triton"] = "cuda"
    checks = []
    for name in self_check.OPERATORS:
        expected = self_check.run(name, "reference", "cpu")
        checks.append(Check(f"kernel {name} reference", "ok", "runs", required=True))
        for backend, device in backends.items():
            if name == "decode" and device != "cpu":
                continue
            try:
                difference = self_check.difference(self_check.run(name, backend, device), expected)
            except Exception as error:
                remedy = "training falls back to the slow reference; see the C++ compiler above"
                checks.append(Check(f"kernel {name} {backend}", "missing", _one_line(error), remedy))
                continue
            good = difference <= 1e-5
            remedy = (
                "" if good else "do not train with it: set model.backend=reference, and report this machine"
            )
            detail = f"runs, {difference:.1e} from the reference"
            checks.append(Check(f"kernel {name} {backend}", "ok" if good else "missing", detail, remedy))
    return checks


def _packages(deep: bool) -> list[Check]:
    checks = []
    for package, purpose in (
        ("deepspeed", "training"),
        ("megatron-core", "the shards' file format"),
        ("ray", "preparing data in parallel"),
        ("mlflow", "tracking runs"),
    ):
        version = _version(package)
        if version is None:
            checks.append(Check(package, "missing", "not installed", f"make venv ({purpose})", required=True))
        else:
            checks.append(Check(package, "ok", version, required=True))
    for package in ("triton", "flash-linear-attention"):
        version = _version(package)
        remedy = "" if version else "only GPUs need it: pip install 'spikescale[gpu]'"
        checks.append(Check(package, "ok" if version else "note", version or "not installed", remedy))
    if deep:
        checks += [_deepspeed_imports(), _ray_runs()]
    return checks


def _deepspeed_imports() -> Check:
    # In a process of its own: DeepSpeed writes to standard output and changes global state on import.
    words = [sys.executable, "-c", "import deepspeed; print(deepspeed.__version__)"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check("DeepSpeed imports", "ok", done.stdout.strip().splitlines()[-1], required=True)
    complaint = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Check("DeepSpeed imports", "missing", complaint, "make distclean venv", required=True)


def _ray_runs() -> Check:
    words = "import ray; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
    words += "assert ray.get(ray.remote(lambda: 42).remote()) == 42; ray.shutdown()"
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", words], capture_output=True, text=True, check=False, timeout=180
        )
        complaint = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        complaint = "no answer in 180 s"
    if not complaint:
        return Check("Ray runs", "ok", f"a task came back in {time.perf_counter() - begin:.0f} s")
    return Check(
        "Ray runs", "missing", complaint, "prepare data with --no-ray; see /tmp/ray/session_latest/logs"
    )


def _mlflow_store(uri: str | None) -> Check:
    name = "MLflow store"
    if uri is None:
        return Check(
            name, "note", "not asked about", "spikescale doctor --mlflow-uri sqlite:///runs/mlflow.db"
        )
    remedy = "training goes on without it; correct mlflow.uri, or set mlflow.enabled=false"
    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=MLFLOW_TIMEOUT) as answer:
                return Check(name, "ok", f"{uri} answers {answer.status}")
        except (OSError, ValueError) as error:
            return Check(name, "missing", f"{uri}: {_one_line(error)}", remedy)
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        if not database.exists():
            return _writable(name, database.parent, f"{database} will be made by the first run", remedy)
        try:
            with contextlib.closing(
                sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
            ) as connection:
                runs = connection.execute("SELECT count(*) FROM runs").fetchone()[0]
        except sqlite3.Error as error:
            return Check(name, "missing", f"{database}: {error}", remedy)
        return _writable(name, database.parent, f"{database}, {runs} runs", remedy)
    if "://" not in uri or uri.startswith("file:"):
        folder = Path(uri.removeprefix("file://").removeprefix("file:"))
        return _writable(name, folder, str(folder), remedy)
    return Check(name, "note", f"{uri}: this kind of store is not checked here", "mlflow itself will say")


def _writable(name: str, folder: Path, detail: str, remedy: str) -> Check:
    """Whether `folder`, or the nearest one above it that exists, takes a file."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check(name, "ok", detail)
    except OSError as error:
        return Check(name, "missing", f"{folder}: {_one_line(error)}", remedy)


def _programs() -> list[Check]:
    checks = []
    # By metadata: merely looking for the module makes setuptools step aside for the standard distutils.
    pip = _version("pip") is not None or shutil.which("pip") is not None
    checks.append(
        Check("pip", "ok", "present")
        if pip
        else Check("pip", "note", "absent", "some corpora are fetched with it")
    )
    for name, remedy in (
        ("npm", "some corpora are fetched with it; the others, and your own files, do without"),
        ("ninja", "DeepSpeed compiles its operators with it: put the environment's bin folder on PATH"),
        (
            "numactl",
            "lets deepspeed --bind_cores_to_rank pin ranks to cores (Debian: apt-get install numactl)",
        ),
        ("git", "runs record the commit they were made from"),
    ):
        path = shutil.which(name)
        beside = Path(sys.executable).parent / name
        if path is None and beside.is_file():
            path = f"{beside} (not on PATH)"
        checks.append(Check(name, "ok", path) if path else Check(name, "note", "absent", remedy))
    return checks


def _disk() -> list[Check]:
    checks = []
    for name, folder in (("disk here", Path.cwd()), ("disk of the cache", files.cache_folder())):
        free = shutil.disk_usage(folder).free
        detail = f"{free / GIB:.1f} GiB free in {folder}"
        if free < LOW_DISK:
            remedy = "a checkpoint takes 20 bytes a parameter; prepared text about 2 bytes a token"
            checks.append(Check(name, "note", detail, remedy))
        else:
            checks.append(Check(name, "ok", detail))
    return checks


def _build_locks() -> list[Check]:
    """Locks of torch's extension builds: a build that was killed leaves its own, and the next one waits."""
    # torch's own variable and default, as in torch.utils.cpp_extension, whose import takes seconds.
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return build_locks(root)


def build_locks(root: Path) -> list[Check]:
    """One check for the lock files below `root`, the folder of torch's extension builds."""
    name = "extension builds"
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    if not locks:
        return [Check(name, "ok", f"no lock left in {root}")]
    ages = [time.time() - lock.stat().st_mtime for lock in locks]
    stale = [lock for lock, age in zip(locks, ages, strict=True) if age > FRESH_LOCK]
    if not stale:
        return [Check(name, "note", f"{locks[0]} is {max(ages):.0f} s old", "a build seems to be running")]
    return [
        Check(
            name,
            "missing",
            f"{lock} was left by a build that was killed; the next run would wait for it forever",
            f"if no build is running: rm '{lock}'",
        )
        for lock in stale
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    return (done.stdout.strip().splitlines() or ["no version"])[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
