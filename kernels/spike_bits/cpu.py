"""Spikes as bits on CPU: `cpu.cpp` bound with ctypes. No operators: packed bits are never differentiated."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from spikescale.kernels.cpu import load_for, pointer


@functools.cache
def library(backend: str) -> ctypes.CDLL:
    """The kernels compiled for `backend`, built at the first call. Raises BuildError."""
    lib = load_for(backend, Path(__file__).with_name("cpu.cpp"))
    for suffix in ("f32", "bf16"):
        for name, result in (("pack", ctypes.c_int32), ("unpack", None)):
            function = getattr(lib, f"{name}_spikes_{suffix}")
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
            function.restype = result
    return lib


def _suffix(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "f32"


def pack_spikes_cpu(spikes: Tensor, backend: str) -> Tensor | None:
    """As `pack_spikes`, for a CPU tensor in float32 or bfloat16."""
    spikes = spikes.detach().contiguous()
    bits = torch.empty(-(-spikes.numel() // 8), dtype=torch.uint8)
    function = getattr(library(backend), f"pack_spikes_{_suffix(spikes.dtype)}")
    others = function(pointer(spikes), pointer(bits), spikes.numel(), torch.get_num_threads())
    return None if others else bits


def unpack_spikes_cpu(bits: Tensor, shape: torch.Size, dtype: torch.dtype, backend: str) -> Tensor:
    """As `unpack_spikes`, to float32 or bfloat16."""
    spikes = torch.empty(shape, dtype=dtype)
    function = getattr(library(backend), f"unpack_spikes_{_suffix(dtype)}")
    function(pointer(bits), pointer(spikes), spikes.numel(), torch.get_num_threads())
    return spikes
