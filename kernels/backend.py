"""Which implementation of an operator runs, and saying so once.

A backend is one of

    auto        the fastest one that supports the device and dtype
    reference   the definition: a plain torch loop, any device and dtype, slow
    cpu         C++ compiled at first use, CPU tensors in float32 or bfloat16, for the widest instruction
                set that this processor has
    cpu-avx512, cpu-avx2, cpu-plain   the same for one named instruction set
    triton      GPU tensors in float32, bfloat16 or float16

A named backend is used or refused, never replaced; only `auto` may fall back, and it says so.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from spikescale.errors import UserError
from spikescale.kernels.build import INSTRUCTION_SETS, BuildError, instruction_sets
from spikescale.kernels.compiling import assume_constant_result

CPU_BACKENDS = tuple(f"cpu-{name}" for name in INSTRUCTION_SETS)
BACKENDS = ("auto", "reference", "cpu", *CPU_BACKENDS, "triton")
OPERATORS = ("activations", "layer_norm", "lif", "lif_norm", "spike_bits", "token_mix", "wkv")  # of the model
CPU_DTYPES = (torch.float32, torch.bfloat16)
# Operators whose C++ takes other dtypes, and those whose reference is a kernel of torch's and not slow.
OTHER_CPU_DTYPES = {"layer_norm": (torch.float32,)}
TORCHS_OWN = ("layer_norm",)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger("spikescale.kernels")


@assume_constant_result
def choose_backend(operator: str, requested: str, device: str, dtype: torch.dtype) -> str:
    """The backend that serves `operator` for tensors of this device and dtype.

    `operator` is a folder of `kernels/`, `device` a device type such as "cpu". The answer is "reference",
    "triton" or one of CPU_BACKENDS. Raises UserError for an unknown backend, and for a named one that
    cannot serve the tensors or cannot be built. Under `torch.compile` this runs once, while tracing.
    """
    if requested not in BACKENDS:
        raise UserError(f"backend {requested!r}: unknown; there are {', '.join(BACKENDS)}")
    if requested == "reference":
        return _announce(operator, "reference", device, dtype, "as asked")
    if requested == "triton":
        if unsupported := _unsupported_by_triton(operator, device, dtype):
            raise UserError(f"backend 'triton' of {operator}: {unsupported}; use 'auto' or 'reference'")
        return _announce(operator, "triton", device, dtype, "as asked")
    if requested.startswith("cpu"):
        if unsupported := _unsupported_by_cpu(operator, device, dtype):
            raise UserError(f"backend {requested!r} of {operator}: {unsupported}; use 'auto' or 'reference'")
        backend = _cpu_backend(requested)
        _load_cpu(operator, backend)
        return _announce(operator, backend, device, dtype, "as asked")
    return _choose_freely(operator, device, dtype)


def build_operators(requested: str) -> None:
    """Compile what a model on the CPU will use, several files at once, instead of each at its first use.

    What cannot be built is left to `choose_backend`, which says so. Nothing to do for "reference", "triton".
    """
    if requested in ("reference", "triton"):
        return
    backend = _cpu_backend("cpu" if requested == "auto" else requested)
    modules = [importlib.import_module(f"spikescale.kernels.{operator}.cpu") for operator in OPERATORS]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for future in [pool.submit(module.library, backend) for module in modules]:
            with contextlib.suppress(BuildError):
                future.result()


def _choose_freely(operator: str, device: str, dtype: torch.dtype) -> str:
    if device != "cpu":
        if unsupported := _unsupported_by_triton(operator, device, dtype):
            return _fall_back(operator, device, dtype, unsupported)
        return _announce(operator, "triton", device, dtype, "on a GPU")
    if unsupported := _unsupported_by_cpu(operator, device, dtype):
        own = "torch's own, as " if operator in TORCHS_OWN else ""
        return _announce(operator, "reference", device, dtype, own + unsupported)
    backend = _cpu_backend("cpu")
    try:
        _load_cpu(operator, backend)
    except BuildError as error:
        return _fall_back(operator, device, dtype, str(error))
    return _announce(operator, backend, device, dtype, "compiled C++")


def _fall_back(operator: str, device: str, dtype: torch.dtype, complaint: str) -> str:
    if operator in TORCHS_OWN:
        return _announce(operator, "reference", device, dtype, f"torch's own, as {complaint}")
    _warn_slow(operator, complaint)
    return "reference"


def _cpu_backend(requested: str) -> str:
    available = instruction_sets()
    if requested == "cpu":
        return f"cpu-{available[0]}"
    if requested.removeprefix("cpu-") not in available:
        raise UserError(f"backend {requested!r}: this processor has only {', '.join(available)}")
    return requested


def _unsupported_by_cpu(operator: str, device: str, dtype: torch.dtype) -> str:
    if device != "cpu":
        return f"the C++ backend takes CPU tensors, not {device}"
    dtypes = OTHER_CPU_DTYPES.get(operator, CPU_DTYPES)
    if dtype not in dtypes:
        return f"the C++ backend takes {' and '.join(map(_name, dtypes))}, not {_name(dtype)}"
    return ""


def _unsupported_by_triton(operator: str, device: str, dtype: torch.dtype) -> str:
    if not _has_triton():
        return "triton is not installed (pip install 'spikescale[gpu]')"
    if operator == "layer_norm" and not _has_fla():
        return "flash-linear-attention is not installed (pip install 'spikescale[gpu]')"
    if device != "cuda" and not interpreting():
        return f"the Triton backend takes GPU tensors, not {device}"
    if dtype not in TRITON_DTYPES:
        return f"the Triton backend takes float32, bfloat16 and float16, not {_name(dtype)}"
    return ""


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_fla() -> bool:
    return importlib.util.find_spec("fla") is not None


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU in its interpreter, for tests (TRITON_INTERPRET=1)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _load_cpu(operator: str, backend: str) -> None:
    importlib.import_module(f"spikescale.kernels.{operator}.cpu").library(backend)


@functools.cache
def _announce(operator: str, backend: str, device: str, dtype: torch.dtype, reason: str) -> str:
    logger.info("%s: backend %s for %s tensors on %s (%s)", operator, backend, _name(dtype), device, reason)
    return backend


@functools.cache
def _warn_slow(operator: str, complaint: str) -> None:
    logger.warning("%s: falling back to the slow reference backend: %s", operator, complaint)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
