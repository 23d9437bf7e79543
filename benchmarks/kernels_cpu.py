"""Every operator on the CPU, forward and backward, beside the reference and the limit of memory.

    python benchmarks/kernels_cpu.py

The limit is the time of the fewest bytes that the operator must move, at the copy bandwidth measured in
the same rounds: forward reads its inputs and writes its outputs, backward reads inputs and output
gradients and writes input gradients. The copy is of one tensor of the operators' size into another that is
there already. Nothing is timed before the results agree with the reference.

The targets are those of wkv and lif in float32, each direction: at most TARGET times the limit, or
TARGET_NANOSECONDS an element and core.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import arguments, measure, positive, report
from torch import Tensor

from spikescale.kernels.activations import sigmoid_gate, squared_relu
from spikescale.kernels.backend import CPU_BACKENDS
from spikescale.kernels.layer_norm import layer_norm
from spikescale.kernels.lif import graded_lif, lif
from spikescale.kernels.lif_norm import lif_residual_norm
from spikescale.kernels.token_mix import token_mix
from spikescale.kernels.wkv import wkv
from spikescale.training.allocator import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
TARGET, TARGET_NANOSECONDS = 2.5, 1.5


@dataclass(frozen=True)
class Operator:
    """One operator on fixed inputs: `call` gives its outputs, of which `leaves` get gradients.

    Forward and backward move so many tensors of the inputs' dtype, and so many in float32 (the residual
    stream, and what is normalised).
    """

    call: Callable[[], tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    forward: tuple[int, int]
    backward: tuple[int, int]


def operators(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> dict[str, Operator]:
    """Every operator, on the same random inputs for every backend."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(dtype).requires_grad_()

    channels = shape[2]
    k, v, gate, x = (random(*shape, dtype=dtype, scale=scale) for scale in (1, 1, 1, 2))
    stream = random(*shape)
    w = (-torch.exp(torch.randn(channels, generator=generator))).requires_grad_()
    u, weight, bias = random(channels), random(channels), random(channels)
    mus = tuple(random(channels) for _ in range(3))
    return {
        "wkv": Operator(lambda: wkv(w, u, k, v, backend=backend)[:1], (k, v, w, u), (3, 0), (5, 0)),
        "wkv gated": Operator(
            lambda: wkv(w, u, k, v, gate=gate, backend=backend)[:1], (k, v, gate, w, u), (4, 0), (7, 0)
        ),
        "lif": Operator(lambda: lif(x, backend=backend)[:1], (x,), (2, 0), (3, 0)),
        **{
            f"graded lif, {levels} levels": Operator(
                lambda n=levels: graded_lif(x, levels=n, signed=True, tau=1.0, backend=backend)[:1],  # type: ignore[misc]
                (x,),
                (2, 0),
                (3, 0),
            )
            for levels in (3, 15)
        },
        "token mix": Operator(
            lambda: tuple(token_mix(stream, mus, dtype=dtype, backend=backend)),
            (stream, *mus),
            (3, 1),
            (3, 2),
        ),
        "relu^2": Operator(lambda: (squared_relu(x, backend),), (x,), (2, 0), (3, 0)),
        "sigmoid gate": Operator(lambda: (sigmoid_gate(gate, v, backend),), (gate, v), (3, 0), (5, 0)),
        "layer norm": Operator(
            lambda: (layer_norm(stream, weight, bias, backend=backend),),
            (stream, weight, bias),
            (0, 2),
            (0, 3),
        ),
        "lif + norm": Operator(
            lambda: lif_residual_norm(stream, x, None, weight, bias, backend=backend)[:2],  # type: ignore[return-value]
            (stream, x, weight, bias),
            (1, 3),
            (2, 4),
        ),
    }


def calls(chosen: dict[str, Operator]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; backward runs on a graph kept from one forward."""
    timed: dict[str, Callable[[], Any]] = {}
    for name, operator in chosen.items():
        outputs = operator.call()
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]

        def backward(operator: Operator = operator, outputs: Any = outputs, grads: Any = grads) -> Any:
            return torch.autograd.grad(outputs, operator.leaves, grads, retain_graph=True)

        timed[f"{name} forward"] = operator.call
        timed[f"{name} backward"] = backward
    return timed


def check(fast: dict[str, Callable[[], Any]], slow: dict[str, Callable[[], Any]], tolerance: float) -> None:
    """Refuse to time what does not agree."""
    for name, call in fast.items():
        for ours, wanted in zip(call(), slow[name](), strict=True):
            error = float((ours - wanted).detach().float().norm() / wanted.detach().float().norm())
            if not error < tolerance:
                raise SystemExit(f"{name}: differs from the reference by {error:.1e}; nothing was timed")


def meets_target(what: str, dtype: torch.dtype, ratio: float, nanoseconds: float) -> bool | None:
    """Whether a timing meets its target; None where it has none."""
    if dtype != torch.float32 or what.rpartition(" ")[0] not in ("wkv", "lif"):
        return None
    return ratio <= TARGET or nanoseconds <= TARGET_NANOSECONDS


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__.splitlines()[0], "kernels_cpu")
    parser.add_argument(
        "--shape", type=positive, nargs=3, default=[4, 1024, 512], metavar=("B", "T", "C"), help="size"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="of the inputs")
    parser.add_argument("--backend", default="cpu", choices=["cpu", *CPU_BACKENDS], help="instruction set")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads; torch's number if absent")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it runs; the times mean nothing"
    )
    options = parser.parse_args()
    if options.quick:
        options.shape, options.repeats = [2, 20, 33], 2
    return options


def main() -> None:
    """Check, measure, print and write."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    shape = tuple(options.shape)
    elements, threads = shape[0] * shape[1] * shape[2], torch.get_num_threads()
    results: dict[str, Any] = {}
    rows = []
    for name in options.dtypes:
        dtype = DTYPES[name]
        chosen = operators(shape, dtype, options.backend)
        fast, slow = calls(chosen), calls(operators(shape, dtype, "reference"))
        check(fast, slow, TOLERANCE[dtype])
        source, target = torch.randn(elements).to(dtype), torch.empty(elements, dtype=dtype)
        timings = measure({"copy": lambda s=source, t=target: t.copy_(s), **fast}, options.repeats)
        reference = measure(slow, 1)
        copied = timings["copy"].median / (2 * dtype.itemsize)
        results[name] = {}
        for what, timing in timings.items():
            moved = 2 * dtype.itemsize
            if what != "copy":
                operator, _, direction = what.rpartition(" ")
                own, wide = getattr(chosen[operator], direction)
                moved = own * dtype.itemsize + 4 * wide
            limit, core = moved * copied, timing.median * threads / elements * 1e9
            peer = f"{reference[what].median * 1e3:.0f}" if what in reference else "-"
            met = meets_target(what, dtype, timing.median / limit, core)
            target = "" if met is None else f"{TARGET:.2f}: {'met' if met else 'missed'}"
            compared = [f"{limit * 1e3:.2f}", f"{timing.median / limit:.2f}", target, f"{core:.2f}", peer]
            rows.append([name, what, timing.milliseconds(), str(moved), *compared])
            results[name][what] = {
                **timing.as_dict(),
                "bytes_element": moved,
                "limit_seconds": limit,
                "times_limit": timing.median / limit,
                "meets_target": met,
                "nanoseconds_element_core": core,
                "reference_seconds": reference[what].median if what in reference else None,
            }
    size = "B {}, T {}, C {}".format(*shape)
    title = f"{size}, backend {options.backend}, {threads} threads, {options.repeats} repeats"
    columns = ["dtype", "", "ms: median (range)", "bytes/element", "limit ms", "x limit"]
    columns += ["target", "ns/element/core", "reference ms"]
    found = {"shape": shape, "threads": threads, "backend": options.backend, "timings": results}
    report(title, columns, rows, found, options.output)


if __name__ == "__main__":
    main()
