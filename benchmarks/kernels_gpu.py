"""The Triton kernels on a GPU: time and bandwidth, beside flash-linear-attention and plain torch.

    python benchmarks/kernels_gpu.py

Each call is the median of triton.testing.do_bench, which empties the cache before every run. Bandwidth is
that of the fewest bytes which the operation must move (inputs read and outputs written once), to be held
against the copy's, measured in the same run. Nothing is timed before the implementations of an operation are
compared, outputs and gradients (`pytest -m gpu` holds them to the references, which would take hours at these
sizes): if one of this project's differs from the first by more than its tolerance, the run ends; what a peer
differs by stands in its row. Results are written after every shape. Without a GPU nothing is measured and
nothing is written.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, show, write_results
from torch import Tensor
from torch.nn import functional as F

from spikescale.kernels.activations import sigmoid_gate, squared_relu
from spikescale.kernels.ahead_of_time import DTYPES, Shape
from spikescale.kernels.layer_norm import layer_norm
from spikescale.kernels.lif import graded_lif, lif
from spikescale.kernels.lif_norm import lif_residual_norm
from spikescale.kernels.token_mix import token_mix
from spikescale.kernels.wkv import initial_state

SHAPES = [(8, 1024, 768), (32, 1024, 768), (8, 4096, 1024), (1, 65536, 768), (1, 1024, 512)]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
DEVICE = "cuda"
OURS = "spikescale"  # what the names of this project's implementations begin with
Call = Callable[[], Any]
Implementations = dict[str, Callable[..., list[Tensor]]]


class Operation:
    """Implementations of one function on the same inputs.

    Args:
        inputs: all of them are differentiated.
        implementations: by name; each takes the inputs and returns its outputs, held to the first's.
        fewest: bytes for an element of (B, T, C) that forward, and backward, must move at least.
    """

    def __init__(
        self,
        inputs: list[Tensor],
        implementations: dict[str, Callable[..., list[Tensor]]],
        fewest: tuple[int, int],
    ) -> None:
        self.inputs, self.implementations, self.fewest = inputs, implementations, fewest

    def forward(self, name: str) -> list[Tensor]:
        return self.implementations[name](*self.inputs)

    def backward(self, name: str) -> Call:
        """The gradients of all inputs, on a graph kept from one forward."""
        outputs = self.forward(name)
        generator = torch.Generator(DEVICE).manual_seed(1)
        grads = [torch.randn(out.shape, generator=generator, device=DEVICE).to(out.dtype) for out in outputs]
        return functools.partial(torch.autograd.grad, outputs, self.inputs, grads, retain_graph=True)

    def differences(self, tolerance: float) -> dict[str, float]:
        """What each differs by from the first, relative, in its worst result; NaN where a result is NaN.

        Raises SystemExit if it is more than the tolerance for one of this project's.
        """
        first, *others = self.implementations
        expected = [*self.forward(first), *self.backward(first)()]
        found = {first: 0.0}
        for name in others:
            actual = [*self.forward(name), *self.backward(name)()]
            errors = torch.stack(
                [
                    (out.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-6)
                    for out, wanted in zip(actual, expected, strict=True)
                ]
            )
            found[name] = float(errors.max().detach())
            if name.startswith(OURS) and not found[name] < tolerance:
                number = int((~(errors < tolerance)).nonzero()[0])
                raise SystemExit(f"{name}: result {number} differs from {first}'s by {errors[number]:.1e}")
        return found


def operations(shape: Shape, dtype: torch.dtype) -> dict[str, Operation]:
    """Every operator; beside it torch's operations where they need no loop over tokens, and fla's equal."""
    batch, _, channels = shape
    e = dtype.itemsize
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*size: int, of: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=generator, device=DEVICE) * scale
        return values.to(of).requires_grad_()

    x, y, k = (random(*shape, of=dtype) for _ in range(3))
    drive, stream = random(*shape, of=dtype, scale=2.0), random(*shape)
    mus = [torch.rand(channels, device=DEVICE).requires_grad_() for _ in range(3)]
    weight, bias, u = random(channels), random(channels), random(channels)
    decay = torch.linspace(-5, 1, channels, device=DEVICE).requires_grad_()
    return {
        "wkv": Operation([k, y, decay, u], _wkv(initial_state(batch, channels, DEVICE)), (3 * e, 5 * e)),
        "lif": Operation([drive], _lif(torch.zeros(batch, channels, device=DEVICE)), (2 * e, 3 * e)),
        "graded_lif": Operation(
            [drive],
            {"spikescale": lambda x: [graded_lif(x, levels=3, signed=True, tau=1.0, backend="triton")[0]]},
            (2 * e, 3 * e),
        ),
        "lif_norm": Operation(
            [stream, drive, weight, bias],
            {"torch and spikescale's lif": _neuron_then_norm, "spikescale": _neuron_and_norm},
            (12 + e, 16 + 2 * e),
        ),
        "layer_norm": Operation(
            [stream, weight, bias],
            {
                "torch": lambda x, weight, bias: [F.layer_norm(x, weight.shape, weight, bias)],
                "spikescale": lambda x, weight, bias: [layer_norm(x, weight, bias, backend="triton")],
                **_fla("fla.modules.norm.layernorm", lambda module: _fla_norm(module.layer_norm)),
            },
            (8, 12),
        ),
        "token_mix": Operation([x, *mus], {"torch": _torch_mix, "spikescale": _mix}, (4 * e, 5 * e)),
        "squared_relu": Operation(
            [x],
            {
                "torch": lambda x: [F.relu(x).square()],
                "spikescale": lambda x: [squared_relu(x, backend="triton")],
                **_fla("fla.modules.activations.ops", lambda module: lambda x: [module.sqrelu(x)]),
            },
            (2 * e, 3 * e),
        ),
        "sigmoid_gate": Operation(
            [x, y],
            {
                "torch": lambda gate, x: [torch.sigmoid(gate) * x],
                "spikescale": lambda gate, x: [sigmoid_gate(gate, x, backend="triton")],
                **_fla("fla.modules.activations.ops", lambda module: lambda g, x: [module.sigmoidglu(g, x)]),
            },
            (3 * e, 5 * e),
        ),
    }


def _wkv(state: Tensor) -> Implementations:
    from spikescale.kernels.wkv.triton import wkv_triton

    def ours(form: str, k: Tensor, v: Tensor, decay: Tensor, u: Tensor) -> list[Tensor]:
        return [wkv_triton(-torch.exp(decay), u, k, v, state, form=form)[0]]

    def fla(module: Any) -> Callable[..., list[Tensor]]:
        first = state.unsqueeze(2)
        return lambda k, v, decay, u: [module.fused_recurrent_rwkv4(decay, u, k, v, first.to(k.dtype))[0]]

    forms = {f"spikescale {form}": functools.partial(ours, form) for form in ("sequential", "chunked")}
    return {**forms, **_fla("fla.ops.rwkv4.fused_recurrent", fla)}


def _lif(v: Tensor) -> Implementations:
    from spikescale.kernels.lif.triton import lif_triton

    def ours(form: str, x: Tensor) -> list[Tensor]:
        return [lif_triton(x, v, None, 2.0, 1.0, 0.0, False, False, 2.0, form=form)[0]]

    return {f"spikescale {form}": functools.partial(ours, form) for form in ("sequential", "parallel")}


def _neuron_then_norm(stream: Tensor, drive: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    total = stream + lif(drive, backend="triton")[0]
    return [total, F.layer_norm(total, weight.shape, weight, bias)]


def _neuron_and_norm(stream: Tensor, drive: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    total, normed, _ = lif_residual_norm(stream, drive, None, weight, bias, backend="triton")
    assert normed is not None
    return [total, normed]


def _fla_norm(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    return lambda x, weight, bias: [function(x, weight, bias)]


def _torch_mix(x: Tensor, *mus: Tensor) -> list[Tensor]:
    previous = F.pad(x, (0, 0, 1, -1)).float()
    return [torch.lerp(previous, x.float(), mu).to(x.dtype) for mu in mus]


def _mix(x: Tensor, *mus: Tensor) -> list[Tensor]:
    return token_mix(x, mus, backend="triton")


def _fla(module: str, take: Callable[[Any], Callable[..., list[Tensor]]]) -> Implementations:
    """A function of fla's under the name "fla", or nothing where fla is not installed."""
    if importlib.util.find_spec("fla") is None:
        return {}
    return {"fla": take(importlib.import_module(module))}


def copy_bandwidth(elements: int, dtype: torch.dtype, repeats: int) -> float:
    """Bytes a second of torch's copy, both ways counted."""
    source = torch.randn(elements, device=DEVICE).to(dtype)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), repeats)


def _seconds(call: Call, repeats: int) -> float:
    from triton.testing import do_bench

    # `rep` is the milliseconds that the repeats take together.
    return do_bench(call, warmup=50, rep=repeats, return_mode="median") / 1e3


def main() -> None:
    """Check, measure, print and write."""
    parser = arguments((__doc__ or "").splitlines()[0], "kernels_gpu")
    parser.set_defaults(repeats=200)
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of x, k, v"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "milliseconds_of_repeats": options.repeats,
    }
    for name, shape in ((dtype, shape) for dtype in options.dtypes for shape in SHAPES):
        dtype, elements = DTYPES[name], shape[0] * shape[1] * shape[2]
        copy = copy_bandwidth(elements, dtype, options.repeats)
        rows, measured = [["copy", "", "", f"{copy / 1e9:.0f}", "1.00", ""]], {}
        for operator, operation in operations(shape, dtype).items():
            differences = operation.differences(TOLERANCE[dtype])
            for implementation in operation.implementations:
                calls = {
                    "forward": functools.partial(operation.forward, implementation),
                    "backward": operation.backward(implementation),
                }
                for (direction, call), fewest in zip(calls.items(), operation.fewest, strict=True):
                    seconds = _seconds(call, options.repeats)
                    bandwidth = fewest * elements / seconds
                    label = f"{operator} {direction}"
                    rows.append(
                        [
                            label,
                            implementation,
                            f"{seconds * 1e3:.3f}",
                            f"{bandwidth / 1e9:.0f}",
                            f"{bandwidth / copy:.2f}",
                            f"{differences[implementation]:.1e}",
                        ]
                    )
                    measured[f"{label}, {implementation}"] = {
                        "seconds": seconds,
                        "bytes_a_second": bandwidth,
                        "of_copy": bandwidth / copy,
                        "difference": differences[implementation],
                    }
        title = f"{name}, B {shape[0]}, T {shape[1]}, C {shape[2]}"
        show(title, ["", "by", "ms", "GB/s", "of copy", "difference"], rows)
        results[title] = {"copy_bytes_a_second": copy, "operations": measured}
        write_results(results, options.output)


if __name__ == "__main__":
    main()
