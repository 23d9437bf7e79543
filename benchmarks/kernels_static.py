"""Triton's kernels as compiled code, without a GPU: resources, instructions, bytes, depth; no timings.

    python benchmarks/kernels_static.py

Every launch of every operator, forward and backward, is compiled for four targets beside the kernels of
flash-linear-attention's RWKV-4 (fla/ops/rwkv4/fused_recurrent.py), whose shapes and dtypes are the same.

    programs     of the launch, and the warps of each, on sm_90
    registers    of a thread; stack and shared memory: bytes of a thread and of a program
    occupancy    share of a multiprocessor's warps that can be resident, from those three
    SASS         instructions of one thread for one element, on sm_90: those of the loop that moves the most
                 memory (of all the code, if there is no loop), by the memory it moves
    bytes        for one element, what all loads and stores of the launch move, counted by running the same
                 launch in Triton's interpreter on one sequence of 64 channels
    formula      what the kernel's formula says they are; for a whole operator the fewest bytes: inputs read
                 and outputs written once, forward and backward
    depth        loads or stores of one row of a tensor that one program makes one after another: tokens,
                 chunks or blocks; a tensor of several rows for each of them counts once

An element is one of (B, T, C). Sums that torch makes of a kernel's partial sums are not counted.
"""

import argparse
import bisect
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import arguments, show, write_results

from spikescale.kernels.ahead_of_time import (
    DTYPES,
    OPERATORS,
    TARGETS,
    Launch,
    Shape,
    compiled_launches,
    operator_calls,
)

FLA = "fla rwkv4"
COUNTED_CHANNELS = 64
COLUMNS = ["", "programs", "registers", "stack", "shared", "occupancy %", "SASS", "bytes", "formula", "depth"]


def fla_call(shape: Shape, dtype: torch.dtype) -> Callable[[], Any]:
    """Forward and backward of flash-linear-attention's RWKV-4, by the functions that launch its kernels."""
    from fla.ops.rwkv4.fused_recurrent import fused_recurrent_rwkv4_backward, fused_recurrent_rwkv4_forward

    batch, _, channels = shape
    k, v, grad = (torch.randn(*shape).to(dtype) for _ in range(3))
    w, u = -torch.rand(channels), torch.randn(channels)
    state = torch.zeros(batch, 3, 1, channels, dtype=dtype)

    def call() -> None:
        _, states = fused_recurrent_rwkv4_forward(w, u, k, v, state)
        fused_recurrent_rwkv4_backward(w, u, k, v, states[:, :, :-1], grad, state)

    return call


def all_calls(
    operators: list[str], shape: Shape, dtype: torch.dtype, chosen_for: Shape
) -> dict[str, Callable[[], Any]]:
    """Every variant of the operators, and fla's RWKV-4, by name."""
    calls = {}
    for operator in operators:
        calls.update(operator_calls(operator, shape, dtype, chosen_for=chosen_for))
        if operator == "wkv":
            calls[FLA] = fla_call(shape, dtype)
    return calls


def fewest_bytes(variant: str, size: int) -> float:
    """Bytes an element of a variant's inputs and outputs, forward and backward; `size` is a number's."""
    name, *options = variant.split(", ")
    if name.startswith("wkv") or name == FLA:
        return (11 if "gate" in options else 8) * size  # k v y; k v dy dk dv; the gate thrice
    if name.startswith("lif_norm"):
        # x, current, x', normed; dx', dnormed, current, x', dx, dcurrent: all but current in float32.
        return (16 if "no norm" in options else 28) + 3 * size
    if name == "spike_bits":
        return 2 * size + 2 / 8
    if name.startswith(("lif", "graded_lif")):
        return 5 * size  # x spikes; x dspikes dx
    if name.startswith("token_mix"):
        mixtures = int(name.split(" ")[-1])
        return (3 + 2 * mixtures) * size
    return {"squared_relu": 5, "sigmoid_gate": 8, "layer_norm": 5}[name] * size


def formula(kernel: str, variant: str, shape: Shape, size: int) -> float | None:
    """Bytes an element by the formula in the operator's notes; None where it has none for one kernel."""
    _, length, _ = shape
    if kernel.startswith("wkv_"):
        from spikescale.kernels.wkv.triton_plan import choose_form, passes

        form = choose_form(*shape, size, name=variant.split(",")[0].split(" ")[1])
        steps = passes(form, length, size, gated="gate" in variant)
        return next(step.bytes_per_element for step in steps if step.name == kernel)
    if kernel.startswith("token_mix"):
        from spikescale.kernels.token_mix.triton import CHUNK

        mixtures, edge = int(variant.split(",")[0].split(" ")[-1]), 1 + 1 / CHUNK
        if "forward" in kernel:
            return size * (edge + mixtures) + 4 * mixtures / CHUNK
        return size * (edge + mixtures * edge + 1) + 8 * mixtures / CHUNK
    return {
        "pack_kernel": size + 1 / 8,
        "unpack_kernel": size + 1 / 8,
        "fused_recurrent_rwkv4_forward_kernel": 6 * size,
        "fused_recurrent_rwkv4_backward_kernel": 8 * size,
        "squared_relu_forward_kernel": 2 * size,
        "squared_relu_backward_kernel": 3 * size,
        "sigmoid_gate_forward_kernel": 3 * size,
        "sigmoid_gate_backward_kernel": 5 * size,
    }.get(kernel)


class Traffic:
    """Counts what interpreted launches load and store, while it is installed."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.rows: dict[int, int] = {}
        self.starts: list[int] = []
        self.accesses: Counter[tuple[int, int, bool]] = Counter()
        self.program = 0

    def install(self) -> None:
        """Wrap the interpreter of this process for good."""
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        GridExecutor.__call__ = self._call(GridExecutor.__call__)
        GridExecutor._init_args_hst = self._arguments(GridExecutor._init_args_hst)
        InterpreterBuilder.set_grid_idx = self._index(InterpreterBuilder.set_grid_idx)
        InterpreterBuilder.create_masked_load = self._access(InterpreterBuilder.create_masked_load, 1, False)
        InterpreterBuilder.create_masked_store = self._access(InterpreterBuilder.create_masked_store, 2, True)

    def _call(self, original: Any) -> Any:
        def call(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.launches.append({"kernel": executor.fn.__name__, "bytes": 0})
            self.accesses.clear()
            original(executor, *args, **kwargs)
            self.launches[-1]["depth"] = max(
                math.ceil(times / self.rows[self.starts[tensor - 1]])
                for (_, tensor, _), times in self.accesses.items()
            )

        return call

    def _arguments(self, original: Any) -> Any:
        def arguments_on_host(executor: Any, args: Any, kwargs: Any) -> Any:
            tensors = [x for x in _flat((args, tuple(kwargs.values()))) if hasattr(x, "data_ptr")]
            self.rows = {x.untyped_storage().data_ptr(): _rows(x.shape) for x in tensors}
            self.starts = sorted(self.rows)
            return original(executor, args, kwargs)

        return arguments_on_host

    def _index(self, original: Any) -> Any:
        def set_grid_idx(builder: Any, *index: int) -> None:
            self.program += 1
            original(builder, *index)

        return set_grid_idx

    def _access(self, original: Any, mask_index: int, store: bool) -> Any:
        def access(builder: Any, pointers: Any, *rest: Any) -> Any:
            # Of several lanes at one address, as when one number is stored by a whole block, one counts.
            touched = set(pointers.data[rest[mask_index - 1].data.astype(bool)].ravel().tolist())
            if touched:
                width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
                self.launches[-1]["bytes"] += width * len(touched)
                tensor = bisect.bisect_right(self.starts, min(touched))
                self.accesses[self.program, tensor, store] += 1
            return original(builder, pointers, *rest)

        return access


def _rows(shape: torch.Size) -> int:
    """Rows that a tensor (batch, ..., channels) has for every token or chunk, of which there are more."""
    inner = shape[1:-1]
    return max(1, math.prod(inner) // max(inner)) if inner and max(inner) else 1


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def count(options: argparse.Namespace) -> None:
    """In a process that interprets: print, as JSON, the launches of every call with their bytes and depth."""
    traffic = Traffic()
    traffic.install()
    shape = (1, options.shape[1], COUNTED_CHANNELS)
    elements = shape[1] * shape[2]
    counted = {}
    for dtype in options.dtypes:
        calls = all_calls(options.operators, shape, DTYPES[dtype], tuple(options.shape))
        for variant, call in calls.items():
            traffic.launches = []
            call()
            counted[f"{variant}, {dtype}"] = [
                {"kernel": x["kernel"], "bytes": x["bytes"] / elements, "depth": x["depth"]}
                for x in traffic.launches
            ]
    print(json.dumps(counted))


def start_counting(options: argparse.Namespace) -> subprocess.Popen[str]:
    """`count` in a process of its own: one that compiles cannot interpret."""
    command = [sys.executable, __file__, "--count", "--dtypes", *options.dtypes]
    command += ["--operators", *options.operators, "--shape", *map(str, options.shape)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish_counting(process: subprocess.Popen[str]) -> dict[str, list[dict[str, Any]]]:
    """What it has printed."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit("counting the bytes failed")
    return json.loads(output.splitlines()[-1])


def instructions_per_element(launch: Launch, bytes_per_element: float) -> float | None:
    """Instructions of a thread for an element; None for code that moves nothing."""
    whole = (sum(launch.instructions.values()), launch.moved_bytes)
    instructions, moved = max(launch.loops, key=lambda loop: loop[1], default=whole)
    if not moved:
        instructions, moved = whole
    return instructions / moved * bytes_per_element if moved else None


def summarise(
    variant: str, dtype: str, shape: Shape, counted: list[dict[str, Any]], compiled: list[list[Launch]]
) -> dict[str, Any]:
    """A variant's bytes, and for every launch the figures common to the targets and those of each."""
    size, entries = DTYPES[dtype].itemsize, []
    for traffic, *launches in zip(counted, *compiled, strict=True):
        if {launch.kernel for launch in launches} != {traffic["kernel"]}:
            raise SystemExit(f"{variant}: compiled and interpreted launches differ")
        entries.append(
            {
                "kernel": traffic["kernel"],
                "bytes_per_element": traffic["bytes"],
                "bytes_per_element_by_formula": formula(traffic["kernel"], variant, shape, size),
                "depth": traffic["depth"],
                "targets": {
                    launch.target: {
                        "programs": launch.programs,
                        "warps": launch.num_warps,
                        "registers": launch.registers,
                        "stack_bytes": launch.spilled_bytes,
                        "shared_bytes": launch.shared_bytes,
                        "occupancy": launch.occupancy,
                        "instructions": sum(launch.instructions.values()),
                        "instructions_per_element": instructions_per_element(launch, traffic["bytes"]),
                    }
                    for launch in launches
                },
            }
        )
    result: dict[str, Any] = {"launches": entries}
    total = sum(entry["bytes_per_element"] for entry in entries)
    if variant == FLA:
        # torch.cat puts the first state before the others: all of them are read and written again.
        result["host_copy_bytes_per_element"] = 6 * size
        total += 6 * size
    result["bytes_per_element"] = total
    result["fewest_bytes_per_element"] = fewest_bytes(variant, size)
    return result


def rows_of(name: str, result: dict[str, Any]) -> list[list[str]]:
    """The table's rows of one variant: the sum, then its kernels."""
    total, fewest = result["bytes_per_element"], result["fewest_bytes_per_element"]
    rows = [[name, *[""] * 6, f"{total:.2f}", f"{fewest:.2f}", ""]]
    for entry in result["launches"]:
        targets = [entry["targets"][target] for target in TARGETS]
        sass, expected = targets[1]["instructions_per_element"], entry["bytes_per_element_by_formula"]
        rows.append(
            [
                f"  {entry['kernel'].removesuffix('_kernel')}",
                f"{targets[1]['programs']} x {targets[1]['warps']}",
                " ".join(str(x["registers"]) for x in targets),
                str(max(x["stack_bytes"] for x in targets)),
                str(max(x["shared_bytes"] for x in targets)),
                " ".join(f"{100 * x['occupancy']:.0f}" for x in targets),
                "-" if sass is None else f"{sass:.1f}",
                f"{entry['bytes_per_element']:.2f}",
                "-" if expected is None else f"{expected:.2f}",
                str(entry["depth"]),
            ]
        )
    return rows


def main() -> None:
    """Count, compile, print and write."""
    parser = arguments((__doc__ or "").splitlines()[0], "kernels_static")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[8, 1024, 768], metavar=("B", "T", "C"), help="size"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of k, v, x"
    )
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="which")
    parser.add_argument(
        "--quick", action="store_true", help="one operator at a tiny size, to see that it runs"
    )
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.shape, options.dtypes = [1, 16, COUNTED_CHANNELS], ["float32"]
        options.operators = ["activations"]
    if options.count:
        count(options)
        return
    shape: Shape = tuple(options.shape)
    counting = start_counting(options)
    try:
        compiled = {
            (variant, dtype): [compiled_launches(call, target) for target in TARGETS]
            for dtype in options.dtypes
            for variant, call in all_calls(options.operators, shape, DTYPES[dtype], shape).items()
        }
        counted = finish_counting(counting)
    finally:
        counting.kill()
    results, rows = {}, {dtype: [] for dtype in options.dtypes}
    for (variant, dtype), launches in compiled.items():
        name = f"{variant}, {dtype}"
        results[name] = summarise(variant, dtype, shape, counted[name], launches)
        rows[dtype] += rows_of(variant, results[name])
    for dtype in options.dtypes:
        where = f"B {shape[0]}, T {shape[1]}, C {shape[2]}"
        show(f"{dtype}, {where}; columns of four: {', '.join(TARGETS)}", COLUMNS, rows[dtype])
    write_results({"shape": shape, "targets": TARGETS, "operators": results}, options.output)


if __name__ == "__main__":
    main()
