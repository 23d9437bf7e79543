"""A Ray cluster that runs already: preparing and training on it by its address or Ray's client."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import TINY, launch, write_corpus

from spikescale.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PREPARE = ["data", "prepare", "--tokenizer", "byte", "--quiet", "--partition-mib", "0.01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in `text`, and what it becomes without Ray in `plain`."""
    folder = tmp_path_factory.mktemp("cluster")
    write_corpus(folder / "text")
    assert (
        main([*PREPARE, "--source", str(folder / "text"), "--output", str(folder / "plain"), "--no-ray"]) == 0
    )
    return folder


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """Of a cluster that asks for the token of the tests: a plain one and the one of Ray's client."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster, address = started_cluster(ray_client_server_port=port)
    yield {"plain": address, "client": f"ray://127.0.0.1:{port}"}
    cluster.shutdown()


def started_cluster(**arguments: object) -> tuple:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, **arguments}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    return cluster, cluster.address


def user_environment(home: Path, **given: str) -> dict[str, str]:
    """As of a user who has the token in the home folder, where Ray looks for it, and nothing set."""
    (home / ".ray").mkdir(parents=True, exist_ok=True)
    (home / ".ray" / "auth_token").write_text(os.environ["RAY_AUTH_TOKEN"])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home), **given}


def prepare(folder: Path, output: Path, address: str, **given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from spikescale.cli.main import entry; entry()", *PREPARE]
    command += ["--source", str(folder / "text"), "--output", str(output)]
    command += ["--ray-address", address, "--workers", "2"]
    environment = user_environment(output.parent / "home", **given)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def data_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


@pytest.mark.parametrize("kind", ["plain", "client"])
def test_data_are_prepared_there(tmp_path: Path, folder: Path, addresses: dict[str, str], kind: str) -> None:
    done = prepare(folder, tmp_path / "out", addresses[kind])
    assert done.returncode == 0, done.stderr
    assert data_files(tmp_path / "out") == data_files(folder / "plain")
    assert len(data_files(folder / "plain")) > 10


def test_a_run_streams_from_there(tmp_path: Path, folder: Path, addresses: dict[str, str]) -> None:
    stream = {"source": [str(folder / "text")], "partition_mib": 0.01}
    stream |= {"ray": "cluster", "ray_address": addresses["plain"], "workers": 2}
    data = {"path": str(tmp_path / "live"), "mode": "streaming", "stream": stream}
    content = {"name": "run", "output": str(tmp_path / "runs"), **TINY, "data": data}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(content))
    assert "shards that are made while they are read" in launch(["--config", str(path)]).stdout
    assert data_files(tmp_path / "live") == data_files(folder / "plain")


def test_another_mode_than_the_cluster_has_is_one_line(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # of the processes of this cluster
    cluster, address = started_cluster()
    try:
        done = prepare(folder, tmp_path / "out", address)
    finally:
        cluster.shutdown()
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: partition ") and "gets no answer from this process" in line
    assert "RAY_AUTH_MODE (here: token)" in line


def test_a_token_is_written_once_and_whole(tmp_path: Path) -> None:
    """Processes that start a local Ray at once, where there is no token yet."""
    script = (
        "from spikescale.data_pipeline.pools import _agree_on_token as agree; import os\n"
        "agree(None); print(os.environ['RAY_AUTH_MODE'])\n"
    )
    environment = user_environment(tmp_path)
    path = tmp_path / ".ray" / "auth_token"
    path.unlink()
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert {process.communicate(timeout=60)[0] for process in processes} == {"token\n"}
    assert len(path.read_text()) == 64 and path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["auth_token"]
