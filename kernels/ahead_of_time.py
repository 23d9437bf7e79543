"""Triton's kernels compiled without a GPU, and what the compiled code needs.

    python -m spikescale.kernels.ahead_of_time --targets sm_90 gfx942 --shape 8 1024 768

`compiled_launches` makes Triton believe that a GPU is there, lets a host function launch its kernels on CPU
tensors, compiles every launch exactly as specialised, and runs none. Resources are read from the compiled
code: from the cubin with the disassembler that Triton ships, and from the hsaco's assembly.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikescale.errors import UserError
from spikescale.kernels.backend import interpreting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel for one target, as compiled.

    Attributes:
        kernel: name of the kernel's function.
        target: one of TARGETS.
        grid: programs along each axis.
        num_warps: warps (wavefronts on gfx942) of one program.
        registers: vector registers a thread, with the accumulation registers on gfx942.
        spilled_bytes: stack, local memory or scratch of one thread: 0 unless registers were spilled.
        shared_bytes: shared memory (LDS) of one program.
        instructions: instructions of the code by operation, without padding.
        moved_bytes: global memory that one thread moves if every instruction is executed once.
        loops: (instructions, moved bytes) of the body of each loop that holds no other.
        occupancy: warps that one multiprocessor can hold at once, as a share of the most that it can hold
            of any kernel; see `occupancy`.
    """

    kernel: str
    target: str
    grid: tuple[int, int, int]
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    moved_bytes: int
    loops: tuple[tuple[int, int], ...]
    occupancy: float

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


def compiled_launches(call: Callable[[], Any], target: str, disassemble: bool = True) -> list[Launch]:
    """Every launch that `call` makes, in order, compiled for `target`; none of them runs.

    `call` invokes host functions that launch Triton kernels, on CPU tensors: their shapes, dtypes and
    alignment specialise the kernels as on a GPU. What it computes is undefined. Nothing is taken from
    Triton's cache. Without `disassemble`, instructions, moved bytes and loops stay empty, which is faster.
    Raises UserError for an unknown target, or when Triton interprets in this process.
    """
    if target not in TARGETS:
        raise UserError(f"target {target!r}: unknown; there are {', '.join(TARGETS)}")
    if interpreting():
        raise UserError("Triton interprets in this process (TRITON_INTERPRET=1), so it cannot compile")
    with tempfile.TemporaryDirectory() as folder:
        with _recorded(target, folder) as records:
            call()
        compiled = {id(kernel): kernel for kernel, _ in records}
        described = {key: _describe(kernel, target, disassemble) for key, kernel in compiled.items()}
    return [Launch(grid=grid, **described[id(kernel)]) for kernel, grid in records]


@contextlib.contextmanager
def _recorded(target: str, cache: str) -> Iterator[list[tuple[Any, tuple[int, int, int]]]]:
    """Inside, launching a kernel compiles it for `target` and appends (compiled kernel, grid)."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    records = []
    launch = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            if callable(grid):
                names = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
                bound = inspect.signature(kernel.fn).bind(*args, **names)
                bound.apply_defaults()
                grid = grid(bound.arguments)
            records.append((compiled, (*grid, 1, 1)[:3]))
        return compiled

    previous = driver._active
    driver.set_active(_Driver(target))
    JITFunction.run = run
    try:
        with knobs.compilation.scope(), knobs.cache.scope():
            knobs.compilation.always_compile = True
            knobs.cache.dir = cache
            yield records
    finally:
        JITFunction.run = launch
        driver._active = previous


class _Driver:
    """What Triton asks of a driver before it compiles: the GPU's kind, and a device and stream to key by."""

    _numbers = itertools.count()

    def __init__(self, target: str) -> None:
        self.target = target
        # A device of its own for every use: Triton keeps compiled kernels by device.
        self.device = next(self._numbers)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.target.startswith("gfx"):
            return GPUTarget("hip", self.target, 64)
        return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def _describe(kernel: Any, target: str, disassemble: bool) -> dict[str, Any]:
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    if target.startswith("gfx"):
        assembly = kernel.asm["amdgcn"]
        registers, scalar_registers = _amd(assembly, "vgpr_count"), _amd(assembly, "sgpr_count")
        spilled = _amd(assembly, "private_segment_fixed_size")
        lines = _amd_lines(assembly) if disassemble else []
    else:
        used = _cuobjdump(kernel.asm["cubin"], "-res-usage")
        registers, stack, local = (int(_found(rf"{key}:(\d+)", used)) for key in ("REG", "STACK", "LOCAL"))
        scalar_registers, spilled = 0, stack + local
        lines = _nvidia_lines(_cuobjdump(kernel.asm["cubin"], "-sass")) if disassemble else []
    return {
        "kernel": kernel.name,
        "target": target,
        "num_warps": warps,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": shared,
        "instructions": dict(Counter(line.operation for line in lines)),
        "moved_bytes": sum(line.moved_bytes for line in lines),
        "loops": _loops(lines),
        "occupancy": occupancy(target, registers, shared, warps, scalar_registers),
    }


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ValueError(f"no {pattern!r} in the compiler's output")
    return match.group(1)


def _amd(assembly: str, key: str) -> int:
    return int(_found(rf"^\s*\.{key}:\s*(\d+)", assembly))


def _cuobjdump(cubin: bytes, option: str) -> str:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__ or "").with_name("bin") / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


class _Line(NamedTuple):
    """An instruction: the one that it may jump to (-1: none), and the global memory that a thread moves."""

    operation: str
    goal: int
    moved_bytes: int


def _nvidia_lines(sass: str) -> list[_Line]:
    pattern = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)([^;]*);", re.MULTILINE)
    found = [(int(address, 16), name, rest) for address, name, rest in pattern.findall(sass)]
    index = {address: i for i, (address, _, _) in enumerate(found)}
    lines = []
    for address, name, rest in found:
        jump = re.search(r"(0x[0-9a-f]+)\s*$", rest) if name == "BRA" else None
        goal = int(jump.group(1), 16) if jump else -1
        moved = 0
        if name in ("LDG", "STG", "LDGSTS", "RED", "ATOMG"):
            width = re.match(r"\S*\.[US]?(8|16|64|128|256)\b", rest)
            moved = int(width.group(1)) // 8 if width else 4
        # What follows the last EXIT is padding: NOPs, and a jump to itself.
        if name != "NOP" and goal != address:
            lines.append(_Line(name, index.get(goal, -1), moved))
    return lines


_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


def _amd_lines(assembly: str) -> list[_Line]:
    code = assembly[: assembly.rindex("s_endpgm") + len("s_endpgm")]
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label.group(1)] = len(found)
        elif instruction := re.match(r"\t([a-z]\w+)\s*([^;]*)", line):
            found.append((instruction.group(1), instruction.group(2).strip()))
    lines = []
    for name, rest in found:
        access = re.match(r"(?:buffer|global|flat)_(?:load|store)_[us]?(dwordx[234]|dword|short|byte)", name)
        goal = labels.get(rest, -1) if "branch" in name else -1
        lines.append(_Line(name, goal, _AMD_WIDTHS[access.group(1)] if access else 0))
    return lines


def _loops(lines: list[_Line]) -> tuple[tuple[int, int], ...]:
    """What lies between the goal of a backward jump and the jump, unless another loop lies there."""
    spans = [(line.goal, end) for end, line in enumerate(lines) if 0 <= line.goal <= end]
    inner = [
        (start, end)
        for start, end in spans
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in spans)
    ]
    return tuple(
        (end - start + 1, sum(line.moved_bytes for line in lines[start : end + 1])) for start, end in inner
    )


def occupancy(target: str, registers: int, shared: int, num_warps: int, scalar_registers: int = 0) -> float:
    """Share of a multiprocessor's warp slots that programs of this size can fill at once.

    NVIDIA (CUDA's occupancy rules, compute capability 8.0, 9.0 and 10.0): 64 warps, 32 programs, 65,536
    registers, handed to a warp in units of 256 and to four sub-partitions of 16,384; shared memory 164, 228
    and 228 KiB in units of 128 bytes, of which every program costs 1 KiB more.
    gfx942 (CDNA 3): four SIMDs of 8 wavefronts; 512 vector registers a lane in units of 8; above 100 scalar
    registers one wavefront fewer; 64 KiB of LDS for the four in units of 512 bytes; 16 programs of more than
    one wavefront.
    """
    if target == "gfx942":
        per_simd = min(8, 512 // _multiple(max(registers, 1), 8), 8 if scalar_registers <= 100 else 7)
        programs = min(4 * per_simd // num_warps, 65536 // _multiple(shared, 512) if shared else 32)
        return min(programs, 16 if num_warps > 1 else 32) * num_warps / 32
    capacity = {"sm_80": 164, "sm_90": 228, "sm_100": 228}[target] * 1024
    per_partition = 16384 // _multiple(max(registers, 1) * 32, 256)
    programs = min(32, 64 // num_warps, 4 * per_partition // num_warps)
    return min(programs, capacity // _multiple(shared + 1024, 128)) * num_warps / 64


def _multiple(value: int, unit: int) -> int:
    return -(-value // unit) * unit


OPERATORS = ("wkv", "lif", "graded_lif", "lif_norm", "layer_norm", "token_mix", "activations", "spike_bits")
_NEURON = (2.0, 1.0, 0.0, False, False, 2.0)  # tau, v_threshold, v_reset, soft_reset, detach_reset, alpha


Shape = tuple[int, int, int]


def operator_calls(
    operator: str, shape: Shape, dtype: torch.dtype, device: str = "cpu", chosen_for: Shape | None = None
) -> dict[str, Callable[[], Any]]:
    """Forward and backward of an operator's Triton implementation, by variant: a form, then its options.

    `operator` is one of OPERATORS, `shape` is (B, T, C). A call takes the gradients of all inputs that can
    have one, so that every kernel is launched. The chunks of time are those chosen for tensors of shape
    `chosen_for`, by default `shape`. Imports Triton.
    """
    batch, length, channels = shape
    chosen_for = chosen_for or shape

    def random(*size: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, device=device).to(of).requires_grad_()

    x, y, z, stream = *(random(*shape, of=dtype) for _ in range(3)), random(*shape)
    vectors = [random(channels) for _ in range(4)]
    row = random(batch, channels)
    reset = torch.zeros(batch, length, dtype=torch.bool, device=device)
    # What a call computes, and of what it takes the gradients.
    calls: dict[str, tuple[Callable[[], Any], list[Tensor]]] = {}
    if operator == "wkv":
        from spikescale.kernels.wkv import initial_state
        from spikescale.kernels.wkv.triton import choose_form, wkv_triton

        decay = (-vectors[0].detach().exp()).requires_grad_()
        state = initial_state(batch, channels, device).requires_grad_()
        inputs = (decay, vectors[1], x, y, state)
        for form in ("chunked", "sequential"):
            chunk = choose_form(*chosen_for, x.element_size(), name=form).chunk or None
            wkv = functools.partial(wkv_triton, *inputs, form=form, chunk=chunk)
            gated = functools.partial(wkv, reset=reset, gate=z)
            calls[f"wkv {form}"] = (wkv, [*inputs])
            calls[f"wkv {form}, gate, reset"] = (gated, [*inputs, z])
    elif operator == "lif":
        from spikescale.kernels.lif import triton as lif_module

        tau = torch.full_like(vectors[0], 2.0).requires_grad_()
        learnt = (tau, vectors[1], 0.0, True, False, 2.0)
        for form in ("parallel", "sequential"):
            chunk = lif_module.choose_form(*chosen_for, form=form).chunk
            lif = functools.partial(lif_module.lif_triton, form=form, chunk=chunk)
            calls[f"lif {form}"] = (functools.partial(lif, x, row, None, *_NEURON), [x, row])
            calls[f"lif {form}, soft, learnt, reset"] = (
                functools.partial(lif, x, row, reset, *learnt),
                [x, row, tau, vectors[1]],
            )
    elif operator == "graded_lif":
        from spikescale.kernels.lif.graded_triton import graded_lif_triton

        tau = torch.full_like(vectors[0], 2.0).requires_grad_()
        signed, soft = (3, True, 0.0, False, False, 2.0), (3, True, 0.0, True, False, 2.0)
        calls["graded_lif"] = (lambda: graded_lif_triton(x, row, None, 1.0, 0.5, signed), [x, row])
        calls["graded_lif, soft, learnt, reset"] = (
            lambda: graded_lif_triton(x, row, reset, tau, vectors[1], soft),
            [x, row, tau, vectors[1]],
        )
    elif operator == "spike_bits":
        from spikescale.kernels.spike_bits.triton import pack_spikes_triton, unpack_spikes_triton

        def there_and_back() -> list[Tensor]:
            bits = pack_spikes_triton(x, sure=True)
            assert bits is not None
            return [unpack_spikes_triton(bits, x.shape, dtype)]

        calls["spike_bits"] = (there_and_back, [])
    elif operator == "layer_norm":
        from spikescale.kernels.layer_norm.triton import layer_norm_triton

        scale, offset = random(channels, of=dtype), random(channels, of=dtype)
        calls["layer_norm"] = (lambda: layer_norm_triton(x, scale, offset, 1e-5), [x, scale, offset])
    elif operator == "lif_norm":
        from spikescale.kernels.lif_norm.triton import lif_residual_norm_triton

        weight, bias = vectors[2], vectors[3]
        calls["lif_norm"] = (
            lambda: lif_residual_norm_triton(stream, x, row, weight, bias, 1e-5, *_NEURON, 0.0, 0, None),
            [stream, x, row, weight, bias],
        )
        calls["lif_norm, dropout, reset, no norm"] = (
            lambda: lif_residual_norm_triton(stream, x, row, None, None, 1e-5, *_NEURON, 0.1, 1, reset),
            [stream, x, row],
        )
    elif operator == "token_mix":
        from spikescale.kernels.token_mix.triton import token_mix_triton

        three, two = vectors[:3], vectors[:2]
        calls["token_mix of 3"] = (lambda: token_mix_triton(x, three, row, None, dtype), [x, *three, row])
        calls["token_mix of 2, reset"] = (lambda: token_mix_triton(x, two, row, reset, dtype), [x, *two, row])
    elif operator == "activations":
        from spikescale.kernels.activations.triton import sigmoid_gate_triton, squared_relu_triton

        calls["squared_relu"] = (lambda: squared_relu_triton(x), [x])
        calls["sigmoid_gate"] = (lambda: sigmoid_gate_triton(x, y), [x, y])
    else:
        raise UserError(f"operator {operator!r}: unknown; there are {', '.join(OPERATORS)}")
    return {name: _with_backward(*call) for name, call in calls.items()}


def _with_backward(function: Callable[[], Any], inputs: list[Tensor]) -> Callable[[], Any]:
    def call() -> Any:
        outputs = function()
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        differentiable = [out for out in outputs if out is not None and out.requires_grad]
        if not differentiable:
            return outputs
        grads = [torch.ones_like(out) for out in differentiable]
        return torch.autograd.grad(differentiable, inputs, grads, allow_unused=True)

    return call


def main() -> None:
    """Compile operators for the targets asked for, and print one JSON object a launch."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--operators",
        nargs="+",
        choices=OPERATORS,
        default=OPERATORS,
        metavar="NAME",
        help="of " + ", ".join(OPERATORS),
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=TARGETS,
        default=TARGETS,
        metavar="NAME",
        help="of " + ", ".join(TARGETS),
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], metavar="NAME"
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[8, 1024, 768], metavar=("B", "T", "C"), help="size"
    )
    parser.add_argument(
        "--variants", choices=("all", "plain", "full"), default="all", help="those without options, or with"
    )
    parser.add_argument("--disassemble", action="store_true", help="count instructions too")
    options = parser.parse_args()
    try:
        for operator, dtype in itertools.product(options.operators, options.dtypes):
            for variant, call in operator_calls(operator, tuple(options.shape), DTYPES[dtype]).items():
                if options.variants != "all" and ("," in variant) != (options.variants == "full"):
                    continue
                for target in options.targets:
                    for launch in compiled_launches(call, target, options.disassemble):
                        line = {"operator": operator, "variant": variant, "dtype": dtype, **asdict(launch)}
                        print(json.dumps(line), flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
