"""LIF: the reference against a loop written from the formulas, the C++ kernel bit for bit against it."""

import itertools
import math

import pytest
import torch

from spikescale.kernels.lif import lif
from spikescale.kernels.surrogate import heaviside

MODES = [
    {"soft_reset": soft, "detach_reset": detach}
    for soft, detach in itertools.product((False, True), repeat=2)
]
SHAPES = [(1, 1, 1), (1, 63, 33), (2, 63, 100), (1, 1000, 5)]


def make_inputs(batch, length, channels):
    generator = torch.Generator().manual_seed(length + channels)
    x = torch.randn(batch, length, channels, generator=generator) * 2 + 0.5
    v = torch.randn(batch, channels, generator=generator) * 0.5
    reset = torch.rand(batch, length, generator=generator) < 0.1
    return x, v, reset


def by_hand(x, v, reset, grad_s, grad_v, tau, v_th, v_reset, alpha, soft_reset, detach_reset):
    """Spikes, final v, and the gradients of x and v, with scalar arithmetic one channel at a time."""
    batch, length, channels = x.shape
    spikes, v_end = torch.zeros_like(x), torch.zeros_like(v)
    grad_x, grad_v0 = torch.zeros_like(x), torch.zeros_like(v)
    for b, c in itertools.product(range(batch), range(channels)):
        membrane, trace = float(v[b, c]), []
        for t in range(length):
            if reset[b, t]:
                membrane = 0.0
            h = membrane + (float(x[b, t, c]) - (membrane - v_reset)) / tau
            fires = h > v_th if soft_reset else h >= v_th
            trace.append((h, fires))
            spikes[b, t, c] = float(fires)
            membrane = (h - v_th if soft_reset else v_reset) if fires else h
        v_end[b, c] = membrane
        grad = float(grad_v[b, c])
        for t in reversed(range(length)):
            h, fires = trace[t]
            surrogate = alpha / 2 / (1 + (math.pi / 2 * alpha * (h - v_th)) ** 2)
            through = 1.0 if soft_reset else 1.0 - fires
            if not detach_reset:
                through += surrogate * (-v_th if soft_reset else v_reset - h)
            grad_h = float(grad_s[b, t, c]) * surrogate + grad * through
            grad_x[b, t, c] = grad_h / tau
            grad = 0.0 if reset[b, t] else grad_h * (1 - 1 / tau)
        grad_v0[b, c] = grad
    return spikes, v_end, grad_x, grad_v0


def evaluate(x, v, reset, dtype, **options):
    x, v = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (x, v))
    spikes, v_end = lif(x, v, reset=reset, **options)
    generator = torch.Generator().manual_seed(3)
    grad_s = torch.randn(x.shape, generator=generator).to(dtype)
    grad_v = torch.randn(v.shape, generator=generator).to(dtype)
    torch.autograd.backward([spikes, v_end], [grad_s, grad_v])
    return (spikes.detach(), v_end.detach(), x.grad, v.grad), grad_s, grad_v


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tau", "v_th", "v_reset", "alpha"), [(2.0, 1.0, 0.0, 2.0), (3.7, 0.8, -0.2, 4.0)])
def test_reference_equals_the_formulas(mode, tau, v_th, v_reset, alpha):
    x, v, reset = make_inputs(2, 40, 5)
    options = {"tau": tau, "v_threshold": v_th, "v_reset": v_reset, "surrogate_alpha": alpha, **mode}
    results, grad_s, grad_v = evaluate(x, v, reset, torch.float64, backend="reference", **options)
    expected = by_hand(x.double(), v.double(), reset, grad_s, grad_v, tau, v_th, v_reset, alpha, **mode)
    assert torch.equal(results[0], expected[0])
    for actual, wanted in zip(results[1:], expected[1:], strict=True):
        assert relative(actual, wanted) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tau", "v_th", "v_reset", "alpha"), [(2.0, 1.0, 0.0, 2.0), (3.7, 0.8, -0.2, 4.0)])
def test_cpu_fires_bit_for_bit_like_the_reference_and_has_its_gradients(
    shape, mode, tau, v_th, v_reset, alpha
):
    x, v, reset = make_inputs(*shape)
    options = {"tau": tau, "v_threshold": v_th, "v_reset": v_reset, "surrogate_alpha": alpha, **mode}
    results, _, _ = evaluate(x, v, reset, torch.float32, backend="cpu", **options)
    expected, _, _ = evaluate(x, v, reset, torch.float32, backend="reference", **options)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])
    for actual, wanted in zip(results[2:], expected[2:], strict=True):
        assert relative(actual, wanted) <= 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_cpu_gradients_equal_a_float64_loop_over_the_same_spikes(mode):
    # Inputs on a coarse grid: float32 and float64 compute the same membranes and so the same spikes.
    x, v, reset = make_inputs(1, 12, 33)
    x, v = (x * 8).round() / 8, (v * 8).round() / 8
    results, grad_s, grad_v = evaluate(x, v, reset, torch.float32, backend="cpu", **mode)
    expected = by_hand(
        x.double(), v.double(), reset, grad_s.double(), grad_v.double(), 2.0, 1.0, 0.0, 2.0, **mode
    )
    assert torch.equal(results[0].double(), expected[0])
    for actual, wanted in zip(results[1:], expected[1:], strict=True):
        assert relative(actual, wanted) <= 1e-6


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_at_the_threshold_a_hard_reset_fires_and_a_soft_one_does_not(backend):
    x = torch.full((1, 1, 1), 2.0)  # h = 1 exactly
    hard, v_hard = lif(x, backend=backend)
    soft, v_soft = lif(x, soft_reset=True, backend=backend)
    assert (hard.item(), v_hard.item()) == (1.0, 0.0)
    assert (soft.item(), v_soft.item()) == (0.0, 1.0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_chunks_equal_the_whole_and_resets_separate_documents(backend):
    x, v, _ = make_inputs(2, 50, 33)
    whole, v_end = lif(x, v, backend=backend)
    first, carried = lif(x[:, :20], v, backend=backend)
    second, carried = lif(x[:, 20:], carried, backend=backend)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(carried, v_end)
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[:, 20] = True
    cut, v_cut = lif(x, v, reset=reset, backend=backend)
    alone, v_alone = lif(x[:, 20:], backend=backend)
    assert torch.equal(cut, torch.cat([first, alone], 1))
    assert torch.equal(v_cut, v_alone)
    assert not torch.equal(alone, second)


def test_bfloat16_spikes_are_those_of_the_same_numbers_in_float32():
    x, v, reset = make_inputs(2, 70, 100)
    x = x.bfloat16()
    for backend in ("reference", "cpu"):
        low, v_low = lif(x, v, reset=reset, backend=backend)
        high, v_high = lif(x.float(), v, reset=reset, backend=backend)
        assert low.dtype == torch.bfloat16
        assert v_low.dtype == torch.float32
        assert torch.equal(low.float(), high)
        assert torch.equal(v_low, v_high)
        assert set(low.unique().tolist()) == {0.0, 1.0}


def test_bfloat16_gradients_are_the_float32_ones_rounded():
    x, _, reset = make_inputs(2, 70, 100)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.bfloat16().to(dtype).requires_grad_()
        lif(leaf, reset=reset, backend="cpu")[0].backward(grad.to(dtype))
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1].bfloat16())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_nan_input_stays_visible_and_an_infinite_one_does_not_pass_for_a_silent_neuron(backend):
    x, _, _ = make_inputs(1, 10, 33)
    x[0, 4, 7] = torch.nan
    spikes, v = lif(x, backend=backend)
    assert spikes[0, 4:, 7].isnan().all()
    assert v[0, 7].isnan()
    assert spikes[0, :, torch.arange(33) != 7].isfinite().all()
    x[0, 4, 7] = torch.inf
    spikes, _ = lif(x, backend=backend)
    assert spikes[0, 4, 7] == 1
    assert spikes[0, 5:, 7].isnan().all()


def test_non_contiguous_input_gives_the_same():
    x, v, reset = make_inputs(2, 40, 66)
    a, v_a = lif(x.transpose(0, 1)[:, :, ::2].transpose(0, 1), v[:, ::2], reset=reset, backend="cpu")
    b, v_b = lif(x[..., ::2].contiguous(), v[:, ::2].contiguous(), reset=reset, backend="cpu")
    assert torch.equal(a, b)
    assert torch.equal(v_a, v_b)


def test_future_tokens_change_nothing():
    x, v, _ = make_inputs(1, 20, 33)
    changed = x.clone()
    changed[:, 11:] += 3
    assert torch.equal(lif(x, v, backend="cpu")[0][:, :11], lif(changed, v, backend="cpu")[0][:, :11])


def test_torch_accepts_the_operator_registration():
    from spikescale.kernels.lif.cpu import lif_forward

    x, v, reset = make_inputs(2, 20, 5)
    options = (2.0, 1.0, 0.0, False, False, 2.0)
    torch.library.opcheck(lif_forward, (x.requires_grad_(), v.requires_grad_(), reset, *options, True))
    torch.library.opcheck(lif_forward, (x.detach(), v.detach(), None, *options, False))


def test_wrong_shapes_are_refused():
    x, v, _ = make_inputs(1, 4, 3)
    with pytest.raises(ValueError, match="v must be"):
        lif(x, v[:, :2])
    with pytest.raises(ValueError, match="reset must be"):
        lif(x, v, reset=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="time >= 1"):
        lif(x[:, :0], v)


def test_heaviside_steps_at_zero_and_backpropagates_the_arctangent_derivative():
    x = torch.tensor([-2.0, -0.1, 0.0, 0.3, torch.nan], requires_grad=True)
    spikes = heaviside(x, alpha=2.0)
    assert spikes[:4].tolist() == [0, 0, 1, 1]
    assert spikes[4].isnan()
    assert heaviside(x, strict=True)[:4].tolist() == [0, 0, 0, 1]
    spikes.backward(torch.ones(5))
    expected = 1 / (1 + (math.pi * x.detach()) ** 2)
    torch.testing.assert_close(x.grad, expected, equal_nan=True)
