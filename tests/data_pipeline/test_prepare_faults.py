"""Preparation disturbed: kills, a lost node, a full disk. The bytes are those of the undisturbed run."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spikescale.cli.main import main
from spikescale.data_pipeline.manifest import load_manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import Document, Source, open_source
from spikescale.errors import UserError

Snapshot = Callable[[Path], dict[str, bytes]]

pytestmark = pytest.mark.slow

QUARANTINE: dict[str, Any] = {"bad_records": "quarantine"}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, jsonl: Path) -> Path:
    """The corpus with three bad records in its middle."""
    lines = jsonl.read_bytes().splitlines(keepends=True)
    for position in (150, 155, 251):
        lines.insert(position, b"{broken\n")
    path = tmp_path_factory.mktemp("poisoned") / "a.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def source_of(path: Path) -> Source:
    return open_source([str(path)], partition_bytes=path.stat().st_size // 10 + 1, **QUARANTINE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, poisoned: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "data"
    prepare(source_of(poisoned), folder, settings(ray=False))
    return folder


def settings(**given: Any) -> PrepareSettings:
    return PrepareSettings(quiet=True, max_bad_share=0.1, **QUARANTINE, **given)


def prepare_command(source: Path, output: Path) -> list[str]:
    size = (source.stat().st_size // 10 + 1) / (1 << 20)
    words = ["data", "prepare", "--source", str(source), "--output", str(output), "--no-ray", "--quiet"]
    words += ["--partition-mib", str(size), "--bad-records", "quarantine", "--max-bad-share", "0.1"]
    return [sys.executable, "-c", "from spikescale.cli.main import entry; entry()", *words]


@pytest.mark.distributed
def test_a_driver_killed_twice_leaves_what_a_third_run_completes(
    tmp_path: Path, poisoned: Path, undisturbed: Path, snapshot: Snapshot
) -> None:
    output = tmp_path / "out"
    script = (
        "import sys, time; from pathlib import Path\n"
        "from tests_faults import settings, source_of\n"
        "from spikescale.data_pipeline import placed, tasks\n"
        "from spikescale.data_pipeline.prepare import prepare\n"
        "placed.BATCH_DOCUMENTS = 5\n"
        "write = tasks._write_batch\n"
        "tasks._write_batch = lambda *a: (write(*a), time.sleep(0.05))\n"
        "prepare(source_of(Path(sys.argv[1])), Path(sys.argv[2]), settings(ray=False))\n"
    )
    (tmp_path / "tests_faults.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The first kill falls while bad records are being set aside, the second after they have their name.
    for awaited in (".tmp-*-quarantine-00003.jsonl", ".tmp-*-train-00005.bin"):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(poisoned), str(output)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        deadline = time.monotonic() + 300
        while not list(output.glob(awaited)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (output / "manifest.json").exists()
    kept = (output / "quarantine-00003.jsonl").stat().st_mtime_ns
    prepare(source_of(poisoned), output, settings(ray=False))
    assert snapshot(output) == snapshot(undisturbed)
    assert (output / "quarantine-00003.jsonl").stat().st_mtime_ns == kept


def test_a_full_disk_is_one_line_and_room_lets_it_go_on(
    tmp_path: Path, poisoned: Path, undisturbed: Path, snapshot: Snapshot
) -> None:
    largest = max(path.stat().st_size for path in undisturbed.glob("*.bin"))

    def small_files_only() -> None:
        # No file may grow beyond this: the kernel fails the write of the largest shard, not of smaller ones.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1))

    command = prepare_command(poisoned, tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=small_files_only)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path / 'out'}: writing failed (File too large); make room and run the same command "
        "again: what is finished is kept\n"
    )
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").glob(".tmp-*"))
    assert main(command[3:]) == 0  # the words after the interpreter's
    expected = snapshot(undisturbed)
    found = snapshot(tmp_path / "out")
    # The command line states its record limit, so the request is another one; the data are the same.
    data = [name for name in expected if name.endswith((".bin", ".idx", ".jsonl", "manifest.json"))]
    assert len(data) > 20 and all(found[name] == expected[name] for name in data)


@pytest.mark.parametrize(
    "name", ["train-00004.bin", "quarantine-00003.jsonl", "test-00006.json", "manifest.json"]
)
def test_no_space_left_at_any_file_is_one_line(
    tmp_path: Path,
    poisoned: Path,
    undisturbed: Path,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    output = tmp_path / "out"
    real = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.endswith(name):
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"out: writing failed \(No space left on device\); make room"):
            prepare(source_of(poisoned), output, settings(ray=False))
    assert not list(output.glob(".tmp-*")) and not (output / "manifest.json").exists()
    prepare(source_of(poisoned), output, settings(ray=False))
    assert snapshot(output) == snapshot(undisturbed)


class Disturbed:
    """A partition whose first readers are killed by the system, or stand still until their node is lost."""

    split = None

    def __init__(self, inner: Any, flags: list[Path], wait_on: str = "") -> None:
        self._inner, self._flags, self._wait_on = inner, flags, wait_on
        self.label, self.size_bytes = inner.label, inner.size_bytes

    def documents(self) -> Iterator[Document]:
        for number, document in enumerate(self._inner.documents()):
            yield document
            if number == 10:
                self._disturb()

    def _disturb(self) -> None:
        import ray

        if self._wait_on:
            here = ray.get_runtime_context().get_node_id() == self._wait_on
            if here and not self._flags[0].exists():
                self._flags[0].touch()
                time.sleep(600)
            while not self._flags[0].exists():
                time.sleep(0.05)  # so that the other node does not do all of the work meanwhile
            return
        for flag in self._flags:
            if not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.distributed
def test_a_node_is_removed_and_workers_are_killed_on_ray(
    tmp_path: Path,
    poisoned: Path,
    undisturbed: Path,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two nodes of one core. A worker is killed twice in one partition, then a node goes."""
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        gone = tmp_path / "second-node-reached"
        source = source_of(poisoned)
        parts: list[Any] = source.partitions()
        parts[3] = Disturbed(parts[3], [tmp_path / "killed-once", tmp_path / "killed-twice"])
        # Whichever of the later partitions the second node gets: its worker stops there.
        parts[4:] = [Disturbed(part, [gone], wait_on=second.node_id) for part in parts[4:]]
        monkeypatch.setattr(source, "partitions", lambda: parts)

        def remove() -> None:
            while not gone.exists():
                time.sleep(0.05)
            cluster.remove_node(second, allow_graceful=False)

        remover = threading.Thread(target=remove, daemon=True)
        remover.start()
        prepare(source, tmp_path / "out", settings(workers=2))
        remover.join(timeout=60)
        assert gone.exists() and (tmp_path / "killed-twice").exists() and not remover.is_alive()
        assert not second.any_processes_alive()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert snapshot(tmp_path / "out") == snapshot(undisturbed)
    load_manifest(tmp_path / "out")
