"""Which implementation of an operator runs, and saying so once.

A backend is one of

    auto        the fastest one that supports the device and dtype
    reference   the definition: a plain torch loop, any device and dtype, slow
    cpu         C++ compiled at first use, CPU tensors in float32 or bfloat16

A named backend is used or refused, never replaced; only `auto` may fall back, and it says so.
"""

import functools
import importlib
import logging

import torch

from spikescale.errors import UserError
from spikescale.kernels.build import BuildError

BACKENDS = ("auto", "reference", "cpu")
CPU_DTYPES = (torch.float32, torch.bfloat16)

logger = logging.getLogger("spikescale.kernels")


@torch.compiler.assume_constant_result
def choose_backend(operator: str, requested: str, device: str, dtype: torch.dtype) -> str:
    """The backend ("reference" or "cpu") that serves `operator` for tensors of this device and dtype.

    `operator` is a folder of `kernels/`, `device` a device type such as "cpu". Raises UserError for an
    unknown backend, and for a named one that cannot serve the tensors or cannot be built. Under
    `torch.compile` this runs once, while tracing.
    """
    if requested not in BACKENDS:
        raise UserError(f"backend {requested!r}: unknown; there are {', '.join(BACKENDS)}")
    if requested == "reference":
        return _announce(operator, "reference", device, dtype, "as asked")
    unsupported = _unsupported_by_cpu(device, dtype)
    if requested == "cpu":
        if unsupported:
            raise UserError(f"backend 'cpu' of {operator}: {unsupported}; use 'auto' or 'reference'")
        _load_cpu(operator)
        return _announce(operator, "cpu", device, dtype, "as asked")
    if unsupported:
        return _announce(operator, "reference", device, dtype, unsupported)
    try:
        _load_cpu(operator)
    except BuildError as error:
        _warn_unbuilt(operator, str(error))
        return "reference"
    return _announce(operator, "cpu", device, dtype, "compiled C++")


def _unsupported_by_cpu(device: str, dtype: torch.dtype) -> str:
    if device != "cpu":
        return f"the C++ backend takes CPU tensors, not {device}"
    if dtype not in CPU_DTYPES:
        return f"the C++ backend takes float32 and bfloat16, not {_name(dtype)}"
    return ""


def _load_cpu(operator: str) -> None:
    importlib.import_module(f"spikescale.kernels.{operator}.cpu").library()


@functools.cache
def _announce(operator: str, backend: str, device: str, dtype: torch.dtype, reason: str) -> str:
    logger.info("%s: backend %s for %s tensors on %s (%s)", operator, backend, _name(dtype), device, reason)
    return backend


@functools.cache
def _warn_unbuilt(operator: str, complaint: str) -> None:
    logger.warning("%s: falling back to the slow reference backend: %s", operator, complaint)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
