"""Handing tensors to C: what the ctypes bindings of the CPU kernels share."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from spikescale.kernels.build import load


def load_for(backend: str, source: Path) -> ctypes.CDLL:
    """The library compiled from `source` for a backend such as "cpu-avx2". Raises BuildError."""
    return load(source, backend.removeprefix("cpu-"))


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor's data, or a null pointer."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """The addresses of several contiguous tensors, as an array of pointers."""
    return (ctypes.c_void_p * len(tensors))(*(pointer(tensor) for tensor in tensors))
