"""Training over two hosts, as a user with two machines starts it: the losses are those of one process."""

import json
import sys
from pathlib import Path

import pytest
from launching import ROOT
from needs import require_programs
from ssh_servers import NEEDED, serve_ssh

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = str(ROOT / "launch" / "pretrain.py")
BINARIES = Path(sys.executable).parent


def words(data, output):
    """Twenty steps of the recipe configs/run/tiny.yaml on the small corpus."""
    settings = [
        "train.steps=20",
        "train.log_every=1",
        "train.evaluate_every=10",
        "train.evaluate_tokens=2000",
    ]
    settings += ["train.save_every=0", "train.sample_count=0", "train.final_evaluation_tokens=1000"]
    settings += ["train.micro_batch_size=4", "train.threads=1", "mlflow.enabled=false"]
    recipe = str(ROOT / "configs" / "run" / "tiny.yaml")
    return ["--config", recipe, f"data.path={data}", f"output={output}", *settings]


def records(output):
    return [json.loads(line) for line in (output / "tiny" / "metrics.jsonl").read_text().splitlines()]


def require_same_losses(found, expected):
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for key, count in (("loss", 20), ("valid_loss", 2)):
        pairs = [(a[key], b[key]) for a, b in zip(found, expected, strict=True) if key in a]
        assert len(pairs) == count
        assert max(abs(a - b) for a, b in pairs) < 1e-4


@pytest.fixture(scope="module")
def one_process(two_hosts, small_data, host_environment, tmp_path_factory):
    """Records of the run in a single process."""
    output = tmp_path_factory.mktemp("single")
    command = [sys.executable, SCRIPT, *words(small_data, output), "zero.stage=0"]
    done = two_hosts.hosts[0].run(command, environment=host_environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return records(output)


def test_deepspeed_reaches_both_hosts_of_a_hostfile_by_ssh(
    two_hosts, one_process, small_data, host_environment, tmp_path
):
    require_programs(NEEDED)
    serve_ssh(two_hosts)
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    # ssh passes no variables on: the launcher takes those of this file, in the folder it is started from.
    lines = [f"{key}={value}" for key, value in host_environment.items()]
    (tmp_path / ".deepspeed_env").write_text("\n".join(lines) + "\n")
    command = [str(BINARIES / "deepspeed"), "--hostfile", "hostfile", SCRIPT]
    command += [*words(small_data, tmp_path), "zero.stage=2"]
    done = two_hosts.hosts[0].run(command, environment=host_environment, folder=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    output = done.stdout + done.stderr
    assert "2 rank(s) on cpu" in output
    assert "node1: " in output and "node2: " in output  # pdsh names the host before each line
    require_same_losses(records(tmp_path), one_process)


def test_torchrun_agents_of_two_hosts_meet(two_hosts, one_process, small_data, host_environment, tmp_path):
    command = [str(BINARIES / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29400", "--rdzv-id", "tiny", SCRIPT]
    command += [*words(small_data, tmp_path), "zero.stage=1"]
    second = two_hosts.hosts[1].start(command, environment=host_environment)
    first = two_hosts.hosts[0].run(command, environment=host_environment, timeout=300)
    out, error = second.communicate(timeout=60)
    assert first.returncode == second.returncode == 0, first.stderr[-6000:] + error[-6000:] + out
    assert "2 rank(s) on cpu" in first.stdout + out
    require_same_losses(records(tmp_path), one_process)
