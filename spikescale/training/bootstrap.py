"""Joining the group of training processes, whoever started them.

The same script runs under `deepspeed`, `torchrun`, `srun` and plain `python`. Each tells a process
its place in variables of its own; DeepSpeed wants them under one set of names, before it is imported.
"""

import importlib
import os
import re
import socket
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spikescale.errors import UserError


@dataclass(frozen=True)
class Process:
    """This process's place among those that train together."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and speaks."""
        return self.rank == 0


def distributed_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process.

    They come from the launcher's own variables where it set them (deepspeed, torchrun), else from
    the SLURM step's, else stand for a single process. Raises UserError for a partial set.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        missing = [
            name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment
        ]
        if missing:
            raise UserError(f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}")
        found = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        found["LOCAL_RANK"] = environment.get("LOCAL_RANK", "0")
        # deepspeed calls it LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE
        found["LOCAL_WORLD_SIZE"] = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "1"))
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        # Only a step started by srun has SLURM_STEP_NUM_TASKS; a plain python in an allocation stays alone.
        found = {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
            "LOCAL_WORLD_SIZE": _first_task_count(environment.get("SLURM_STEP_TASKS_PER_NODE", "1")),
            "MASTER_ADDR": environment.get("MASTER_ADDR")
            or first_host(
                environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "127.0.0.1")
            ),
            "MASTER_PORT": environment.get("MASTER_PORT")
            or str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000),
        }
    else:
        found = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
    found["LOCAL_SIZE"] = found["LOCAL_WORLD_SIZE"]
    return found


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `node[07-09,12],gpu3` gives `node07`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST: cannot read a host from {nodelist!r}")
    return match.group(1) + (match.group(2) or "") + (match.group(3) or "")


def prepare_process(environment: Mapping[str, str] | None = None) -> Process:
    """Set this process up (variables, device) and say where it stands; starts no communication."""
    variables = distributed_variables(os.environ if environment is None else environment)
    os.environ.update(variables)
    local_rank, local_size = int(variables["LOCAL_RANK"]), int(variables["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank}: this machine has only {torch.cuda.device_count()} GPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"
    return Process(int(variables["RANK"]), int(variables["WORLD_SIZE"]), local_rank, local_size, device)


def set_threads(process: Process, threads: int | None) -> None:
    """Set the CPU threads of this rank; None shares the machine's cores among the ranks on it."""
    if process.device.type == "cpu":
        mine, all_cores = available_cores(), os.cpu_count() or 1
        # A launcher that binds ranks to cores (srun, --bind_cores_to_rank) has shared them already.
        torch.set_num_threads(threads or (mine if mine < all_cores else max(1, mine // process.local_size)))


def join_processes(process: Process) -> None:
    """Start the communication between the ranks (NCCL on GPUs, gloo on CPUs). Waits for all of them."""
    silence_known_noise()
    deepspeed = _import_deepspeed()
    # Building this CPU extension takes a minute and needs ninja, and only DeepSpeed's inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if process.device.type == "cuda" else "gloo"
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _join_round(process, backend)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = "the port is taken" if "EADDRINUSE" in str(error) else str(error).partition("\n")[0]
        raise UserError(
            f"{address}: the ranks cannot meet there ({reason}); give the launcher another port"
            " (deepspeed --master_port, torchrun --master-port)"
        ) from None


def _join_round(process: Process, backend: str) -> None:
    """Start torch's communication in the store of torchrun's agent, apart from ranks that have ended."""
    from torch.distributed.constants import default_pg_timeout

    from spikescale.training.rendezvous import round_store

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = torch.distributed.TCPStore(
        address, port, process.world_size, is_master=False, timeout=default_pg_timeout
    )
    store = round_store(shared, process.rank, process.world_size, default_pg_timeout)
    torch.distributed.init_process_group(
        backend, store=store, rank=process.rank, world_size=process.world_size, timeout=default_pg_timeout
    )


def leave_processes() -> None:
    """End the communication, if it was started."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def available_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _import_deepspeed() -> Any:
    """DeepSpeed, without what it imports for parts that nothing here uses: seconds of every rank's start."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # its autotuner imports it if it can
    try:
        import deepspeed
        from deepspeed.runtime import compiler
    finally:
        if hidden:
            del sys.modules["mlflow"]
    # Its stages ask whether the optimizer is Muon, whose functions go to torch's compiler when imported.
    compile_function, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_function
    return deepspeed


def silence_known_noise() -> None:
    """Hide warnings of torch, DeepSpeed and megatron-core that a user can do nothing about."""
    import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\..*")
    warnings.filterwarnings(
        "ignore", category=UserWarning, message=r".*lr_scheduler.*", module=r"deepspeed\..*"
    )
    warnings.filterwarnings(
        "ignore", category=UserWarning, message="Transformer Engine and Apex are not", module=r"megatron\..*"
    )
    deepspeed_log = logging.getLogger("DeepSpeed")
    deepspeed_log.setLevel(logging.WARNING)
    # A dropped update is said in our own words, with the reason, which this line gets wrong for a loss spike.
    deepspeed_log.addFilter(lambda record: "OVERFLOW! Skipping step" not in record.getMessage())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _first_task_count(tasks_per_node: str) -> str:
    # "2(x3),1": two tasks on each of three nodes, one on the last. Ranks on uneven nodes share cores
    # by the first node's count, which only affects the default number of threads.
    match = re.match(r"\d+", tasks_per_node)
    return match.group(0) if match else "1"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
