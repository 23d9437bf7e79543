"""Token shift and its mixtures: C++ against the reference, for every instruction set."""

import itertools

import pytest
import torch

from spikescale.kernels.build import instruction_sets
from spikescale.kernels.token_mix import token_mix

BACKENDS = [f"cpu-{name}" for name in instruction_sets()]
SHAPES = [(1, 1, 1), (2, 63, 33), (1, 200, 100), (3, 64, 16)]


def make_inputs(batch, length, channels, count):
    generator = torch.Generator().manual_seed(length + channels)
    x = torch.randn(batch, length, channels, generator=generator)
    mus = [torch.rand(channels, generator=generator) for _ in range(count)]
    last = torch.randn(batch, channels, generator=generator)
    reset = torch.rand(batch, length, generator=generator) < 0.1
    grads = [torch.randn(batch, length, channels, generator=generator) for _ in range(count)]
    return x, mus, last, reset, grads


def evaluate(inputs, dtype, backend, out=None, with_reset=True):
    """Outputs, and the gradients of x, last and every mu."""
    x, mus, last, reset, grads = inputs
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, last, *mus)]
    reset = reset if with_reset else None
    outputs = token_mix(leaves[0], leaves[2:], leaves[1], reset, out, backend)
    gradients = torch.autograd.grad(outputs, leaves, [grad.to(outputs[0].dtype) for grad in grads])
    return [output.detach() for output in outputs], gradients


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def test_reference_equals_the_formula_token_by_token():
    x, mus, last, reset, _ = make_inputs(2, 9, 5, 2)
    mixed = token_mix(x.double(), mus, last.double(), reset, backend="reference")
    for b, t, n in itertools.product(range(2), range(9), range(2)):
        before = last[b] if t == 0 else x[b, t - 1]
        before = torch.zeros(5) if reset[b, t] else before
        expected = mus[n].double() * x[b, t] + (1 - mus[n].double()) * before
        torch.testing.assert_close(mixed[n][b, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_are_the_references_bit_for_bit_and_gradients_those_of_float64(shape, count, backend):
    inputs = make_inputs(*shape, count)
    for with_reset in (True, False):
        outputs, gradients = evaluate(inputs, torch.float32, backend, with_reset=with_reset)
        exact, _ = evaluate(inputs, torch.float32, "reference", with_reset=with_reset)
        _, expected = evaluate(inputs, torch.float64, "reference", with_reset=with_reset)
        assert all(torch.equal(a, b) for a, b in zip(outputs, exact, strict=True))
        # C = T = 1: a single number may cancel, so the bound is on the sum's largest terms.
        bound = 1e-6 if shape != (1, 1, 1) else 1e-5
        assert max(relative(a, b) for a, b in zip(gradients, expected, strict=True)) <= bound


@pytest.mark.parametrize(("wide", "narrow"), [(torch.float32, torch.bfloat16), (torch.bfloat16, None)])
def test_bfloat16_is_the_float32_result_rounded(wide, narrow):
    inputs = make_inputs(2, 40, 33, 3)
    inputs = (inputs[0].to(wide).float(), *inputs[1:])
    outputs = token_mix(inputs[0].to(wide), inputs[1], inputs[2], inputs[3], narrow, "cpu")
    exact = token_mix(inputs[0], inputs[1], inputs[2], inputs[3], None, "cpu")
    for output, float_output in zip(outputs, exact, strict=True):
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, float_output.bfloat16())


def test_bfloat16_output_gradients_are_those_of_the_rounded_gradients():
    x, mus, last, reset, grads = make_inputs(2, 40, 33, 3)
    rounded = (x, mus, last, reset, [grad.bfloat16().float() for grad in grads])
    _, gradients = evaluate(rounded, torch.float32, "cpu", torch.bfloat16)
    _, expected = evaluate(rounded, torch.float64, "reference")
    assert max(relative(a, b) for a, b in zip(gradients, expected, strict=True)) <= 1e-6


def test_pieces_that_carry_the_last_token_equal_the_whole():
    x, mus, last, _, _ = make_inputs(2, 50, 33, 2)
    whole = token_mix(x, mus, last, backend="cpu")
    first = token_mix(x[:, :23], mus, last, backend="cpu")
    second = token_mix(x[:, 23:], mus, x[:, 22], backend="cpu")
    for n in range(2):
        assert torch.equal(torch.cat([first[n], second[n]], dim=1), whole[n])


def test_non_contiguous_inputs_and_unused_outputs():
    x, mus, last, reset, grads = make_inputs(2, 33, 20, 3)
    wide = torch.randn(2, 33, 40)
    wide[:, :, ::2] = x
    strided = wide[:, :, ::2].requires_grad_()
    plain = x.clone().requires_grad_()
    for leaf in (strided, plain):
        outputs = token_mix(leaf, mus, last, reset, backend="cpu")
        outputs[1].backward(grads[1])
    assert torch.equal(strided.grad, plain.grad)


def test_gradients_do_not_depend_on_the_number_of_threads():
    inputs = make_inputs(2, 300, 65, 3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(inputs, torch.float32, "cpu")[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_shapes_that_do_not_match_are_refused():
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="one to three"):
        token_mix(x, [])
    with pytest.raises(ValueError, match=r"mu must be \(3,\)"):
        token_mix(x, [torch.zeros(2)])
    with pytest.raises(ValueError, match=r"last must be \(1, 3\)"):
        token_mix(x, [torch.zeros(3)], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="bool"):
        token_mix(x, [torch.zeros(3)], reset=torch.zeros(1, 2))
