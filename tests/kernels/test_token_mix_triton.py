"""The token shift's Triton kernels, interpreted, against the float64 reference."""

import os

import pytest
import torch
from torch import Tensor
from triton_harness import bf16_rounding, checked_memory, mutated

from spikescale.kernels.token_mix import token_mix
from spikescale.kernels.token_mix.reference import token_mix_reference

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: run pytest without -m gpu"
)
MODULE = "spikescale.kernels.token_mix.triton"


def make_inputs(batch: int, length: int, channels: int, mixtures: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length * 100 + channels)
    inputs = {"x": torch.randn(batch, length, channels, generator=generator)}
    for n in range(mixtures):
        # Beyond 0 and 1 too, as training may move them there.
        inputs[f"mu{n}"] = torch.rand(channels, generator=generator) * 1.4 - 0.2
    return {**inputs, "last": torch.randn(batch, channels, generator=generator)}


def make_reset(batch: int, length: int) -> Tensor:
    reset = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.15
    reset[0, 0] = True
    return reset


def evaluate(function, inputs, reset, dtype, out_dtype=None):
    """Outputs and gradients by name, of a fixed random combination of the outputs."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: tensor.detach().to(dtype if name == "x" else compute).requires_grad_()
        for name, tensor in inputs.items()
    }
    mus = [leaf for name, leaf in leaves.items() if name.startswith("mu")]
    outputs = function(leaves["x"], mus, leaves["last"], reset, out_dtype or dtype)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    names = [*(f"out{n}" for n in range(len(outputs))), *leaves]
    return dict(zip(names, [*(out.detach() for out in outputs), *grads], strict=True))


def triton(x, mus, last, reset, dtype):
    return token_mix(x, mus, last, reset, dtype, backend="triton")


def errors_of(function, inputs, reset, dtype=torch.float32, out_dtype=None):
    actual = evaluate(function, inputs, reset, dtype, out_dtype)
    rounded = {**inputs, "x": inputs["x"].to(dtype)}
    expected = evaluate(token_mix_reference, rounded, reset, torch.float64)
    # Sums of many terms of size 1: one below 1 is what is left after cancellation.
    return {
        name: float((actual[name].double() - tensor).norm() / tensor.norm().clamp_min(1.0))
        for name, tensor in expected.items()
    }


@pytest.mark.parametrize(
    ("batch", "length", "channels", "mixtures", "with_reset"),
    [
        (1, 1, 1, 1, False),
        (2, 1, 33, 2, True),
        (1, 32, 100, 2, True),
        (1, 63, 1, 3, True),
        (2, 63, 33, 3, True),
        (1, 63, 100, 3, False),
        (1, 200, 33, 1, True),
        (1, 200, 100, 2, False),
    ],
)
def test_outputs_and_gradients_equal_the_float64_reference(batch, length, channels, mixtures, with_reset):
    inputs = make_inputs(batch, length, channels, mixtures)
    reset = make_reset(batch, length) if with_reset else None
    with checked_memory(length):
        errors = errors_of(triton, inputs, reset)
    assert max(errors.values()) <= 1e-5, errors


def test_forward_equals_the_float32_reference_bit_for_bit():
    inputs, reset = make_inputs(1, 40, 300, 3), make_reset(1, 40)
    actual = evaluate(triton, inputs, reset, torch.float32)
    expected = evaluate(token_mix_reference, inputs, reset, torch.float32)
    for n in range(3):
        assert torch.equal(actual[f"out{n}"], expected[f"out{n}"])


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_are_rounded_once(dtype, out_dtype):
    inputs, reset = make_inputs(1, 40, 100, 2), make_reset(1, 40)
    with bf16_rounding(), checked_memory(1):
        errors = errors_of(triton, inputs, reset, dtype, out_dtype)
    steps = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-5}
    for name, error in errors.items():
        limit = steps[out_dtype] if name.startswith("out") else steps[dtype] if name == "x" else 1e-5
        assert error <= limit, (name, error)


@pytest.mark.parametrize("layout", ["time first", "every second channel", "part of a wider row"])
def test_inputs_need_not_be_contiguous(layout):
    inputs, reset = make_inputs(2, 40, 33, 2), make_reset(40, 2).t()
    x = inputs["x"]
    if layout == "time first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "every second channel":
        x = x.repeat_interleave(2, dim=2)[:, :, ::2]
    else:
        x = torch.cat([x, x], dim=2)[:, :, :33]
    assert not x.is_contiguous()
    mus = [inputs[f"mu{n}"].repeat_interleave(2)[::2] for n in range(2)]
    last = inputs["last"].t().contiguous().t()
    with checked_memory(2):
        outputs = token_mix(x, mus, last, reset, backend="triton")
    expected = token_mix_reference(x, mus, last, reset, torch.float32)
    for out, wanted in zip(outputs, expected, strict=True):
        assert out.is_contiguous()
        assert torch.equal(out, wanted)


def test_gradients_may_be_strided_or_missing():
    inputs = make_inputs(1, 33, 16, 2)
    x, last = inputs["x"].requires_grad_(), inputs["last"].requires_grad_()
    mus = [inputs["mu0"].requires_grad_(), inputs["mu1"].requires_grad_()]
    token_mix(x, mus, last, backend="triton")[1].sum().backward()  # an expanded gradient, and none
    mu = inputs["mu1"].detach()
    expected = mu.expand(33, 16) + (1 - mu) * (torch.arange(33) < 32)[:, None]
    assert torch.allclose(x.grad[0], expected, atol=1e-6)
    assert torch.allclose(last.grad[0], 1 - mu, atol=1e-6)
    assert mus[0].grad.eq(0).all()


def test_pieces_joined_by_last_equal_the_whole():
    inputs = make_inputs(2, 100, 33, 3)
    x, last = inputs["x"], inputs["last"]
    mus = [inputs[f"mu{n}"] for n in range(3)]
    whole = token_mix(x, mus, last, backend="triton")
    first = token_mix(x[:, :37], mus, last, backend="triton")
    second = token_mix(x[:, 37:], mus, x[:, 36], backend="triton")
    for n in range(3):
        assert torch.equal(torch.cat([first[n], second[n]], dim=1), whole[n])


def test_operators_are_well_formed_for_torch_compile():
    from spikescale.kernels.token_mix.triton import token_mix_forward

    inputs = make_inputs(1, 5, 4, 2)
    mus = [inputs[f"mu{n}"].requires_grad_() for n in range(2)]
    arguments = (inputs["x"].requires_grad_(), mus, inputs["last"].requires_grad_(), None, torch.float32)
    torch.library.opcheck(token_mix_forward, arguments)


MUTATIONS = {
    "gradient of x without the next token": ("(own + through).to(", "own.to("),
    "gradient of mu with the wrong neighbour": ("grad * (value - previous)", "grad * (value - before)"),
    "gradient that passes a reset": (
        "through = tl.where(starts, 0.0, next_through) if HAS_RESET else next_through",
        "through = next_through",
    ),
    "chunk that ignores the one after it": (
        "_when(after < length, inside), other=0.0)",
        "inside & False, other=0.0)",
    ),
    "forward that starts each chunk from last": (
        "if start == 0:\n        previous",
        "if start >= 0:\n        previous",
    ),
}


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_a_planted_error_in_the_maths_is_found(mutation):
    inputs, reset = make_inputs(1, 40, 8, 2), make_reset(1, 40)
    reset[0, 35], reset[0, 32] = True, False  # one inside a chunk, none where the chunks meet
    if mutation is None:
        assert max(errors_of(triton, inputs, reset).values()) <= 1e-5
        return
    with mutated(MODULE, *MUTATIONS[mutation]):
        errors = errors_of(triton, inputs, reset)
    assert max(errors.values()) > 1e-3, errors


BOUNDARY_MUTATIONS = {
    "store after the end": (
        "tl.store(out, mixed.to(outputs[n].dtype.element_ty), mask=_when(t < length, inside))",
        "tl.store(out, mixed.to(outputs[n].dtype.element_ty), mask=inside)",
    ),
    "load before the start": ("_when((t > 0) & (t <= length), inside)", "_when(t <= length, inside)"),
    "no mask of channels": ("c, c < channels\n", "c, c < channels + 1\n"),
}


@pytest.mark.parametrize("mutation", BOUNDARY_MUTATIONS)
def test_a_planted_error_in_a_boundary_mask_is_found(mutation):
    inputs = make_inputs(1, 45, 33, 2)
    with (
        mutated(MODULE, *BOUNDARY_MUTATIONS[mutation]),
        checked_memory(0),
        pytest.raises(AssertionError, match=r"token_mix_\w+_kernel: program .* (outside the tensors|stores)"),
    ):
        errors_of(triton, inputs, None)
