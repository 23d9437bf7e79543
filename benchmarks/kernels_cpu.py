"""WKV and LIF on the CPU, forward and backward, beside the reference and the limit of memory.

    python benchmarks/kernels_cpu.py

The limit is the time of the fewest bytes that the operation must move, at the copy bandwidth measured
in the same rounds: forward reads its inputs and writes its outputs, backward reads inputs and output
gradients and writes input gradients. Nothing is timed before the results agree with the reference.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import arguments, measure, report
from torch import Tensor

from spikescale.kernels.lif import lif
from spikescale.kernels.wkv import wkv

LIF = {
    "tau": 2.0,
    "v_threshold": 1.0,
    "v_reset": 0.0,
    "soft_reset": False,
    "detach_reset": False,
    "surrogate_alpha": 2.0,
}
# Tensors of the input's size that must cross the memory bus.
TENSORS = {"wkv forward": 3, "wkv backward": 5, "lif forward": 2, "lif backward": 3}


def operators(batch: int, length: int, channels: int, backend: str) -> dict[str, Callable[[], Any]]:
    """The calls to be timed; backward runs on a graph kept from one forward."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    shape = (batch, length, channels)
    k, v, x, g = random(*shape), random(*shape), random(*shape), random(*shape).detach()
    with torch.no_grad():
        x.mul_(2)
        w, u = -torch.exp(random(channels)), random(channels)
    w, u = w.requires_grad_(), u.requires_grad_()
    y, _ = wkv(w, u, k, v, backend=backend)
    s, _ = lif(x, backend=backend, **LIF)
    return {
        "wkv forward": lambda: wkv(w, u, k, v, backend=backend)[0],
        "wkv backward": lambda: torch.autograd.grad(y, (w, u, k, v), g, retain_graph=True)[2],
        "lif forward": lambda: lif(x, backend=backend, **LIF)[0],
        "lif backward": lambda: torch.autograd.grad(s, x, g, retain_graph=True)[0],
    }


def main() -> None:
    """Check, measure, print and write."""
    parser = arguments(__doc__.splitlines()[0], "kernels_cpu")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[4, 1024, 512], metavar=("B", "T", "C"), help="size"
    )
    options = parser.parse_args()
    batch, length, channels = options.shape
    fast = operators(batch, length, channels, "cpu")
    reference = operators(batch, length, channels, "reference")
    for name, call in fast.items():
        expected = reference[name]()
        error = float((call() - expected).detach().norm() / expected.detach().norm())
        if not error < 1e-5:
            raise SystemExit(f"{name}: differs from the reference by {error:.1e}; nothing was timed")

    elements = batch * length * channels
    source, target = torch.randn(elements), torch.empty(elements)
    timings = measure({"copy": lambda: target.copy_(source), **fast}, options.repeats)
    slow = measure(reference, 1)
    byte_seconds = timings["copy"].median / (2 * 4 * elements)
    threads = torch.get_num_threads()
    rows, results = [], {}
    for name, timing in timings.items():
        limit = TENSORS.get(name, 2) * 4 * elements * byte_seconds
        core_nanoseconds = timing.median * threads / elements * 1e9
        rows.append(
            [
                name,
                timing.milliseconds(),
                f"{limit * 1e3:.2f}",
                f"{timing.median / limit:.1f}",
                f"{core_nanoseconds:.2f}",
                f"{slow[name].median * 1e3:.0f}" if name in slow else "-",
            ]
        )
        results[name] = {
            "median_seconds": timing.median,
            "fastest_seconds": timing.fastest,
            "slowest_seconds": timing.slowest,
            "limit_seconds": limit,
            "nanoseconds_element_core": core_nanoseconds,
            "reference_seconds": slow[name].median if name in slow else None,
        }
    title = f"B {batch}, T {length}, C {channels}, float32, {threads} threads, {options.repeats} repeats"
    columns = ["", "ms: median (range)", "limit ms", "x limit", "ns/element/core", "reference ms"]
    report(
        title, columns, rows, {"shape": options.shape, "threads": threads, "timings": results}, options.output
    )


if __name__ == "__main__":
    main()
