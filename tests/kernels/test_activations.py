"""relu^2 and the sigmoid gate: C++ against float64, for every instruction set, honest at the edges."""

import math

import pytest
import torch

from spikescale.kernels.activations import sigmoid_gate, squared_relu
from spikescale.kernels.build import instruction_sets

BACKENDS = [f"cpu-{name}" for name in instruction_sets()]


def evaluate(x, gate, grad, dtype, backend):
    """Both functions, and the gradients of relu^2's x, of the gate and of what it multiplies."""
    a, b, c = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, gate, x))
    y, z = squared_relu(a, backend), sigmoid_gate(b, c, backend)
    gradients = torch.autograd.grad([y, z], [a, b, c], [grad.to(y.dtype)] * 2)
    return [tensor.detach() for tensor in (y, z, *gradients)]


def make_inputs(*shape):
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return [torch.randn(*shape, generator=generator) * scale for scale in (4, 6, 1)]


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (3, 63), (2, 1000, 33), (40000,)])
def test_values_and_gradients_are_those_of_float64(shape, backend):
    inputs = make_inputs(*shape)
    actual = evaluate(*inputs, torch.float32, backend)
    expected = evaluate(*inputs, torch.float64, "reference")
    assert [tensor.dtype for tensor in actual] == [torch.float32] * 5
    assert max(relative(a, b) for a, b in zip(actual, expected, strict=True)) <= 5e-7


def test_reference_equals_the_formulas():
    x, gate = torch.tensor([-2.0, 0.0, 3.0]).double(), torch.tensor([1.0, -4.0, 0.5]).double()
    assert squared_relu(x, "reference").tolist() == [0.0, 0.0, 9.0]
    expected = [value / (1 + math.exp(-g)) for value, g in zip(x.tolist(), gate.tolist(), strict=True)]
    assert sigmoid_gate(gate, x, "reference").tolist() == pytest.approx(expected, rel=1e-14)


def test_bfloat16_is_the_float32_result_rounded_once():
    inputs = [tensor.bfloat16().float() for tensor in make_inputs(3, 200)]
    narrow = evaluate(*inputs, torch.bfloat16, "cpu")
    wide = evaluate(*inputs, torch.float32, "cpu")
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nan_and_infinity_come_out_as_such(backend):
    edges = torch.tensor([math.nan, math.inf, -math.inf, 1e30])
    squares = squared_relu(edges, backend)
    assert squares[0].isnan()
    assert squares[1:].tolist() == [math.inf, 0.0, math.inf]
    one = torch.ones(4)
    gated = sigmoid_gate(torch.tensor([math.nan, math.inf, -math.inf, -200.0]), one, backend)
    assert gated[0].isnan()
    assert gated[1:].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_saturated_gate_keeps_the_digits_of_its_gradient(backend):
    gate = torch.tensor([20.0, -20.0, 60.0, -60.0], requires_grad=True)
    sigmoid_gate(gate, torch.ones(4), backend).sum().backward()
    exact = [math.exp(-abs(g)) / (1 + math.exp(-abs(g))) ** 2 for g in gate.tolist()]
    assert gate.grad.tolist() == pytest.approx(exact, rel=1e-6)


def test_non_contiguous_tensors_and_mixed_dtypes():
    x = torch.randn(6, 8)[:, ::2]
    assert torch.equal(squared_relu(x, "cpu"), squared_relu(x.contiguous(), "cpu"))
    gate = torch.randn(4, 6).T.bfloat16()
    mixed = sigmoid_gate(gate, x, "cpu")
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, sigmoid_gate(gate.float().contiguous(), x.contiguous(), "cpu"))
    with pytest.raises(ValueError, match="one shape"):
        sigmoid_gate(torch.zeros(2), torch.zeros(3))
