"""The channel mix's elementwise Triton kernels, interpreted, against the float64 reference."""

import os

import pytest
import torch
from triton_harness import bf16_rounding, checked_memory, mutated

from spikescale.kernels.activations import sigmoid_gate, squared_relu
from spikescale.kernels.activations.reference import sigmoid_gate_reference, squared_relu_reference

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: run pytest without -m gpu"
)
MODULE = "spikescale.kernels.activations.triton"
FUNCTIONS = {
    "squared_relu": (squared_relu, squared_relu_reference, 1),
    "sigmoid_gate": (sigmoid_gate, sigmoid_gate_reference, 2),
}
STEPS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}


def make_inputs(count, *shape, scale=3.0):
    generator = torch.Generator().manual_seed(len(shape))
    return [torch.randn(*shape, generator=generator) * scale for _ in range(count)]


def evaluate(function, inputs, dtype, **options):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = function(*leaves, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).bfloat16().to(dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def errors_of(name, inputs, dtype=torch.float32):
    function, reference, _ = FUNCTIONS[name]
    actual = evaluate(function, inputs, dtype, backend="triton")
    expected = evaluate(reference, [x.to(dtype) for x in inputs], torch.float64)
    return [
        float((a.double() - e).norm() / e.norm().clamp_min(1e-30))
        for a, e in zip(actual, expected, strict=True)
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("shape", [(1,), (2, 63, 33), (1024,), (3, 1000, 1)])
def test_output_and_gradients_equal_the_float64_reference(name, dtype, shape):
    inputs = make_inputs(FUNCTIONS[name][2], *shape)
    with bf16_rounding(), checked_memory(len(shape)):
        errors = errors_of(name, inputs, dtype)
    assert max(errors) <= STEPS[dtype], errors


def test_the_gate_keeps_its_gradient_far_from_zero():
    """sigmoid (1 - sigmoid) is e^-60 at 60 and at -60: a difference of rounded numbers would be 0 at 60."""
    gate = torch.tensor([-80.0, -60.0, -1.0, 0.0, 1.0, 20.0, 60.0, 80.0], requires_grad=True)
    sigmoid_gate(gate, torch.ones(8), backend="triton").sum().backward()
    small = torch.exp(-gate.detach().double().abs())
    expected = small / (1 + small) ** 2
    assert ((gate.grad.double() - expected).abs() <= 1e-6 * expected).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_nan_stays_a_nan_and_infinity_is_no_nan(name):
    function, _, count = FUNCTIONS[name]
    x = torch.tensor([torch.nan, 0.0, -1.0, torch.inf])
    y = function(*[x] * count, backend="triton")
    assert y[0].isnan()
    assert y[1] == 0
    assert y[3] == torch.inf


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_need_not_be_contiguous_and_may_be_empty(name):
    function, reference, count = FUNCTIONS[name]
    inputs = [x.transpose(1, 2)[:, ::2] for x in make_inputs(count, 2, 33, 40)]
    with checked_memory(0):
        y = function(*inputs, backend="triton")
    assert y.is_contiguous()
    assert torch.allclose(y, reference(*inputs), rtol=1e-6)
    assert function(*[torch.empty(0, 3)] * count, backend="triton").shape == (0, 3)


def test_squared_relu_keeps_its_output_for_backward_and_not_its_input():
    x = torch.randn(8, 8, requires_grad=True)
    y = squared_relu(x, backend="triton")
    kept = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None]
    assert [tensor.data_ptr() for tensor in kept] == [y.data_ptr()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators_are_well_formed_for_torch_compile(name):
    from spikescale.kernels.activations import triton

    inputs = [x.requires_grad_() for x in make_inputs(FUNCTIONS[name][2], 5, 4)]
    torch.library.opcheck(getattr(triton, f"{name}_forward"), inputs)


MUTATIONS = {
    "squared_relu": ("2.0 * positive * grad", "positive * grad"),
    "sigmoid_gate": ("small * large * large", "small * large"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_error_in_a_gradient_is_found(name):
    inputs = make_inputs(FUNCTIONS[name][2], 100)
    with mutated(MODULE, *MUTATIONS[name]):
        assert max(errors_of(name, inputs)) > 1e-2
    assert max(errors_of(name, inputs)) <= 1e-6


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_planted_error_in_the_boundary_mask_is_found(name):
    inputs = make_inputs(FUNCTIONS[name][2], 100)
    with (
        mutated(MODULE, "i < size", "i <= size"),
        checked_memory(0),
        pytest.raises(AssertionError, match=f"{name}_forward_kernel: .* outside the tensors: 1 lanes"),
    ):
        errors_of(name, inputs)
