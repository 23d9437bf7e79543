"""Every stage beside the others, and which one to take."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from spikescale.config.schema import ZeroConfig
from spikescale.planning.devices import Device
from spikescale.planning.memory import MemoryPlan, Workload, plan_memory
from spikescale.planning.throughput import Throughput, plan_throughput

USABLE = 0.92  # of a device's memory; the rest is for what an allocator cannot place
NVME = Path("/nvme")  # stands for a folder on a fast local disk
Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Candidate:
    """One way to shard and offload a run."""

    workload: Workload
    memory: MemoryPlan
    throughput: Throughput
    fits: bool

    @property
    def zero(self) -> ZeroConfig:
        """The settings of this candidate."""
        return self.workload.zero

    @property
    def name(self) -> str:
        """`2`, or `2-cpu` with offload: as in `configs/zero/stage2-cpu.yaml`."""
        place = self.zero.offload_optimizer
        return str(self.zero.stage) + ("" if place == "none" else f"-{place}")

    def settings(self) -> dict[str, dict[str, object]]:
        """What to write into a run's file to get this candidate, by section."""
        train = self.workload.train
        zero: dict[str, object] = {"preset": "stage" + self.name}
        if self.zero.offload_optimizer == "nvme":
            zero["nvme_path"] = str(self.zero.nvme_path)
        parallel = self.workload.parallel
        return {
            "train": {
                "batch_size": train.batch_size,
                "micro_batch_size": self.workload.micro_batch,
                "precision": train.precision,
                "activation_checkpointing": train.activation_checkpointing,
            },
            "zero": zero,
            "parallel": {"tensor": parallel.tensor, "context": parallel.context},
        }


def zero_settings(base: ZeroConfig, stage: int, offload: Offload) -> ZeroConfig:
    """`base` with another stage, and with offload of all that the stage can move away."""
    return base.model_copy(
        update={
            "preset": None,
            "stage": stage,
            "offload_optimizer": offload,
            "offload_parameters": "cpu" if stage == 3 and offload != "none" else "none",
            "nvme_path": (base.nvme_path or NVME) if offload == "nvme" else None,
        }
    )


def assess(workload: Workload, device: Device, memory: int, host_memory: int | None) -> Candidate:
    """What a workload needs, and whether `memory` bytes a device and `host_memory` a rank are enough."""
    plan = plan_memory(workload)
    fits = plan.device_bytes <= USABLE * memory
    if not workload.on_cpu and host_memory is not None:
        fits = fits and plan.host_bytes <= USABLE * host_memory
    return Candidate(workload, plan, plan_throughput(workload, device), fits)


def candidates(
    workload: Workload, device: Device, memory: int, host_memory: int | None, stages: tuple[int, ...]
) -> list[Candidate]:
    """Each stage, without and with offload, in order of how much it moves away from the device."""
    found = []
    for stage in stages:
        if (stage == 3 and workload.parallel.tensor > 1) or (stage >= 2 and workload.parallel.context > 1):
            continue  # the settings refuse these
        places: tuple[Offload, ...] = ("none",) if stage == 0 else ("none", "cpu")
        for place in (*places, "nvme") if stage == 3 else places:
            zero = zero_settings(workload.zero, stage, place)
            found.append(assess(replace(workload, zero=zero), device, memory, host_memory))
    return found


def recommend(found: list[Candidate]) -> Candidate | None:
    """The fastest of those that fit; among equals the one that moves less. None when nothing fits."""
    fitting = [candidate for candidate in found if candidate.fits]
    order = {"none": 0, "cpu": 1, "nvme": 2}
    return min(
        fitting,
        key=lambda c: (order[c.zero.offload_optimizer], round(c.throughput.seconds, 3), c.zero.stage),
        default=None,
    )
