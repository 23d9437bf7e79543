"""Moving training state off the device: DeepSpeed's settings for it, and what they need of the machine.

With the optimizer's state in host memory, Adam runs on the processor. On a GPU that is DeepSpeedCPUAdam,
compiled at first use (about 80 s, once). On CPUs it is torch's fused Adam: the state is in host memory either
way, the kernel is vectorised too, and nothing is compiled.
"""

import contextlib
import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from spikescale.config import RunConfig
from spikescale.errors import UserError
from spikescale.training.bootstrap import Process

# All-gather buckets of weights that stage 3 keeps gathered, because they are used again soon; DeepSpeed's own
# limit, 1e9 weights, is more than all of these models. The planner counts with the same number.
GATHERED_BUCKETS = 5
LARGEST_BUFFERS = 5  # weights that are on their way from or to an NVMe

logger = logging.getLogger("spikescale.training")


def sharding_settings(config: RunConfig, replicas: int) -> dict[str, Any]:
    """What DeepSpeed's `zero_optimization` needs beside stage and buckets.

    `replicas`: ranks that hold the same weights, over which they are sharded.
    """
    zero = config.zero
    settings: dict[str, Any] = {}
    if zero.stage == 3:
        live = GATHERED_BUCKETS * zero.allgather_bucket_size
        settings |= {
            "stage3_prefetch_bucket_size": zero.allgather_bucket_size,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
        }
    if zero.offload_optimizer != "none":
        settings["offload_optimizer"] = _place(zero.offload_optimizer, zero.nvme_path)
    if zero.offload_optimizer == "nvme":
        # Each group of weights that is updated at once is in memory four times while it is.
        settings["sub_group_size"] = zero.reduce_bucket_size
    if zero.offload_parameters != "none":
        place = _place(zero.offload_parameters, zero.nvme_path)
        if zero.offload_parameters == "nvme":
            largest = config.model.width * max(int(config.model.vocab_size or 0), 4 * config.model.width)
            place |= {
                "max_in_cpu": 0,
                "buffer_count": LARGEST_BUFFERS,
                "buffer_size": -(-largest // replicas),
            }
        settings["offload_param"] = place
    return settings


def _place(device: str, path: Path | None) -> dict[str, Any]:
    return {"device": device, "nvme_path": str(path)} if device == "nvme" else {"device": device}


def optimizer_class(config: RunConfig, device: torch.device) -> tuple[type[Any], dict[str, Any]]:
    """The optimizer and its own arguments, by `train.optimizer`, the device and where the state lives."""
    decoupled = config.train.optimizer == "adamw"
    if config.zero.offload_optimizer != "none" and device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam, {"adamw_mode": decoupled}
    return (torch.optim.AdamW if decoupled else torch.optim.Adam), {"fused": True}


def describe_offload(config: RunConfig, device: torch.device) -> str:
    """Where state lives and what updates it, in words for the first lines of a run; empty without offload."""
    zero = config.zero
    if zero.offload_optimizer == zero.offload_parameters == "none":
        return ""
    words = []
    if zero.offload_optimizer != "none":
        words.append(f"optimizer on {zero.offload_optimizer} ({optimizer_class(config, device)[0].__name__})")
    if zero.offload_parameters != "none":
        words.append(f"weights on {zero.offload_parameters}")
    return " with " + ", ".join(words)


def require_offload(config: RunConfig, process: Process) -> None:
    """Refuse offload that this machine cannot do, before anything is built. Raises UserError."""
    zero = config.zero
    if zero.offload_optimizer != "none" and process.device.type == "cuda":
        _require_builder(
            "CPUAdamBuilder", "zero.offload_optimizer", "a C++ compiler and ninja, to build cpu_adam"
        )
    if "nvme" not in (zero.offload_optimizer, zero.offload_parameters):
        return
    if zero.offload_parameters == "nvme" and process.device.type == "cpu":
        # DeepSpeed 0.19.8 swaps weights through bfloat16 buffers where the device has no float16.
        raise UserError(
            "zero.offload_parameters = nvme: DeepSpeed rounds float32 weights to bfloat16 without a GPU;"
            " use cpu or none"
        )
    path = zero.nvme_path
    assert path is not None, "the schema asks for it"
    if not path.is_dir():
        raise UserError(f"zero.nvme_path = {path}: no such folder; make it on a fast local disk")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"zero.nvme_path = {path}: not writable")
    key = "offload_optimizer" if zero.offload_optimizer == "nvme" else "offload_parameters"
    _require_builder(
        "AsyncIOBuilder", f"zero.{key} = nvme", "libaio (Debian: apt-get install libaio-dev), for async_io"
    )
    if process.is_main:
        logger.warning("NVMe offload: DeepSpeed compiles async_io at first use, which takes a minute or more")


def _require_builder(name: str, key: str, needs: str) -> None:
    import deepspeed.ops.op_builder as builders

    # Its probe compiles a few lines and lets the compiler talk.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        compatible = shutil.which("ninja") is not None and getattr(builders, name)().is_compatible()
    if not compatible:
        raise UserError(f"{key}: needs {needs}; install it, or choose none")
