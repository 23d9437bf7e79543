"""A process finds its place under every launcher."""

import pytest

from spikescale.errors import UserError
from spikescale.training.bootstrap import distributed_variables, first_host


def place(environment):
    found = distributed_variables(environment)
    return tuple(
        found[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )


def test_deepspeed_launcher():
    environment = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }
    assert place(environment) == ("3", "4", "1", "2", "10.0.0.1", "29500")


def test_torchrun_names_the_local_size_differently():
    environment = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1234",
    }
    assert place(environment) == ("1", "2", "1", "2", "h", "1234")


def test_slurm_step():
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "123456",
    }
    assert place(environment) == ("5", "8", "1", "4", "gpu07", str(20000 + 123456 % 20000))


def test_python_inside_an_allocation_without_srun_stays_alone():
    assert place({"SLURM_JOB_ID": "9", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})[:4] == ("0", "1", "0", "1")


def test_plain_python_is_a_group_of_one_on_loopback():
    found = place({})
    assert found[:5] == ("0", "1", "0", "1", "127.0.0.1")
    assert 0 < int(found[5]) < 65536


def test_a_partial_set_of_variables_is_refused():
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT"):
        distributed_variables({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("node1", "node1"), ("node1,node2", "node1"), ("a[3-5,9],b1", "a3"), ("n[01]-ib,x", "n01-ib")],
)
def test_first_host_of_a_slurm_node_list(nodelist, host):
    assert first_host(nodelist) == host
