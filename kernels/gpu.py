"""What all launches of Triton kernels share: the device to launch on, and the size of a warp."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from spikescale.kernels.backend import interpreting
from spikescale.kernels.compiling import assume_constant_result

# Multiprocessors of an H100, assumed where there is no GPU: in the interpreter, and compiling ahead of time.
MULTIPROCESSORS = 132


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context for launches of Triton kernels on x: they go to the current GPU, whatever x is on.

    Inside, x's GPU is the current one. For CPU tensors, which the interpreter takes, nothing happens.
    """
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def warp_size() -> int:
    """Lanes of a warp (a wavefront on AMD) of the GPU that kernels are compiled for; interpreting: 32."""
    if interpreting():
        return 32
    from triton.runtime import driver

    return int(driver.active.get_current_target().warp_size)


def warps(threads: int) -> int:
    """Warps of a program of so many threads, at least one."""
    return max(threads // warp_size(), 1)


@assume_constant_result
def multiprocessors(device: torch.device) -> int:
    """How many of them a GPU has; MULTIPROCESSORS for the CPU."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
