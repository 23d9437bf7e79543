"""LIF: the reference against a loop written from the formulas, the C++ kernel bit for bit against it."""

import functools
import itertools
import math

import pytest
import torch

from spikescale.kernels.build import instruction_sets
from spikescale.kernels.lif import lif
from spikescale.kernels.surrogate import heaviside

MODES = [
    {"soft_reset": soft, "detach_reset": detach}
    for soft, detach in itertools.product((False, True), repeat=2)
]
SHAPES = [(1, 1, 1), (1, 63, 33), (2, 63, 100), (1, 1000, 5)]
NEURONS = [(2.0, 1.0, 0.0, 2.0), (3.7, 0.8, -0.2, 4.0)]  # tau, threshold, v_reset, alpha
CPU = [f"cpu-{name}" for name in instruction_sets()]


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
@pytest.mark.parametrize(("tau", "v_th", "v_reset", "alpha"), NEURONS)
def test_reference_equals_the_formulas(mode, tau, v_th, v_reset, alpha):
    x, v, reset = make_inputs(2, 40, 5)
    options = {"tau": tau, "v_threshold": v_th, "v_reset": v_reset, "surrogate_alpha": alpha, **mode}
    results, grad_s, grad_v = evaluate(x, v, reset, torch.float64, backend="reference", **options)
    expected = by_hand(x.double(), v.double(), reset, grad_s, grad_v, tau, v_th, v_reset, alpha, **mode)
    assert torch.equal(results[0], expected[0])
    for actual, wanted in zip(results[1:], expected[1:], strict=True):
        assert relative(actual, wanted) <= 1e-12


@functools.cache
def reference_results(shape, soft_reset, detach_reset, tau, v_th, v_reset, alpha):
    options = {"tau": tau, "v_threshold": v_th, "v_reset": v_reset, "surrogate_alpha": alpha}
    mode = {"soft_reset": soft_reset, "detach_reset": detach_reset}
    return evaluate(*make_inputs(*shape), torch.float32, backend="reference", **options, **mode)[0]


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tau", "v_th", "v_reset", "alpha"), NEURONS)
def test_cpu_fires_bit_for_bit_like_the_reference_and_has_its_gradients(
    shape, mode, tau, v_th, v_reset, alpha, backend
):
    x, v, reset = make_inputs(*shape)
    options = {"tau": tau, "v_threshold": v_th, "v_reset": v_reset, "surrogate_alpha": alpha, **mode}
    results, _, _ = evaluate(x, v, reset, torch.float32, backend=backend, **options)
    expected = reference_results(shape, *mode.values(), tau, v_th, v_reset, alpha)
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


@pytest.mark.parametrize("backend", ["reference", *CPU])
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
    for backend in ("reference", *CPU):
        low, v_low = lif(x, v, reset=reset, backend=backend)
        high, v_high = lif(x.float(), v, reset=reset, backend=backend)
        assert low.dtype == torch.bfloat16
        assert v_low.dtype == torch.float32
        assert torch.equal(low.float(), high)
        assert torch.equal(v_low, v_high)
        assert set(low.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("backend", CPU)
def test_bfloat16_gradients_are_the_float32_ones_rounded(backend):
    x, _, reset = make_inputs(2, 70, 100)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.bfloat16().to(dtype).requires_grad_()
        lif(leaf, reset=reset, backend=backend)[0].backward(grad.to(dtype))
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1].bfloat16())


@pytest.mark.parametrize("backend", ["reference", *CPU])
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


def learned_neurons(channels, powers_of_two):
    """A time constant and a threshold for every channel."""
    generator = torch.Generator().manual_seed(channels)
    tau = torch.rand(channels, generator=generator) * 5 + 1
    if powers_of_two:
        tau = 2.0 ** torch.randint(0, 4, (channels,), generator=generator)
    return tau, torch.randint(2, 12, (channels,), generator=generator) / 8


def evaluate_learned(x, v, reset, tau, threshold, dtype, **options):
    """Spikes, last membrane, and the gradients of x, v, tau and threshold."""
    leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (x, v, tau, threshold)]
    spikes, v_end = lif(*leaves[:2], tau=leaves[2], v_threshold=leaves[3], reset=reset, **options)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(tensor.shape, generator=generator).to(dtype) for tensor in (x, v)]
    torch.autograd.backward([spikes, v_end], grads)
    return [spikes.detach(), v_end.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_tau_and_threshold_of_every_channel_have_the_gradients_of_the_reference(mode, powers_of_two, backend):
    x, v, reset = make_inputs(2, 63, 100)
    neurons = learned_neurons(100, powers_of_two)
    results = evaluate_learned(x, v, reset, *neurons, torch.float32, backend=backend, **mode)
    expected = evaluate_learned(x, v, reset, *neurons, torch.float32, backend="reference", **mode)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])
    for actual, wanted in zip(results[2:], expected[2:], strict=True):
        assert relative(actual, wanted) <= 2e-6


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_tau_and_threshold_equal_float64_over_the_same_spikes(mode):
    x, v, reset = make_inputs(2, 63, 33)
    x, v = (x * 8).round() / 8, (v * 8).round() / 8
    neurons = learned_neurons(33, True)
    results = evaluate_learned(x, v, reset, *neurons, torch.float32, backend="cpu", **mode)
    expected = evaluate_learned(x, v, reset, *neurons, torch.float64, backend="reference", **mode)
    assert torch.equal(results[0].double(), expected[0])
    for actual, wanted in zip(results[2:], expected[2:], strict=True):
        assert relative(actual, wanted) <= 1e-6


def test_a_number_and_the_same_number_for_every_channel_give_the_same_bits():
    x, v, reset = make_inputs(2, 63, 33)
    for tau in (2.0, 3.7):
        each = {"tau": torch.full((33,), tau), "v_threshold": torch.full((33,), 0.8)}
        one, v_one = lif(x, v, reset=reset, tau=tau, v_threshold=0.8, backend="cpu")
        all_, v_all = lif(x, v, reset=reset, backend="cpu", **each)
        assert torch.equal(one, all_)
        assert torch.equal(v_one, v_all)


@pytest.fixture
def with_threads():
    """Runs a function with so many torch threads."""
    before = torch.get_num_threads()

    def run(threads, function, *arguments, **options):
        torch.set_num_threads(threads)
        return function(*arguments, **options)

    yield run
    torch.set_num_threads(before)


def drives(kind, channels, dtype=torch.float32, length=1000):
    """An input current, and a membrane before it."""
    generator = torch.Generator().manual_seed(channels)
    noise = torch.randn(1, length, channels, generator=generator)
    x = {"random": noise * 2 + 0.5, "steady": 1.3 + 1e-3 * noise, "constant": 1.15 + 0 * noise}[kind]
    return x.to(dtype), torch.rand(1, channels, generator=generator) * 0.9


# Eight threads and one block of channels: time is cut into segments of 144 tokens.
@pytest.mark.parametrize("mode", MODES[::2])
@pytest.mark.parametrize("tau", [2.0, 3.7, None])
@pytest.mark.parametrize("kind", ["random", "steady", "constant"])
def test_segments_of_time_give_the_very_bits_of_one_pass(kind, tau, mode, with_threads):
    from spikescale.kernels.lif.cpu import lif_forward

    for channels, dtype in ((33, torch.float32), (33, torch.bfloat16), (64, torch.float32)):
        x, v = drives(kind, channels, dtype)
        tensors, number = (None, None), tau
        if tau is None:
            tensors, number = learned_neurons(channels, False), 1.0
        options = (number, 1.0, 0.0, *mode.values(), 2.0, True, "cpu-plain")
        reset = torch.rand(1, 1000, generator=torch.Generator().manual_seed(1)) < 0.003
        for mask in (None, reset):
            whole = with_threads(1, lif_forward, x, v, mask, *tensors, *options)
            cut = with_threads(8, lif_forward, x, v, mask, *tensors, *options)
            for one, other in zip(whole, cut, strict=True):
                assert torch.equal(one, other)


def test_a_constant_drive_is_one_whose_segments_never_meet_the_true_membrane(with_threads):
    # What makes the test above hard: started early from 0, a segment still ends out of step.
    x, v = drives("constant", 33)
    for start in range(144, 1000 - 144, 144):
        _, guessed = lif(x[:, start - 64 : start + 144], backend="cpu")
        _, true = lif(x[:, : start + 144], v, backend="cpu")
        assert not torch.equal(guessed, true)
    reference, v_reference = lif(x, v, backend="reference")
    spikes, v_end = with_threads(8, lif, x, v, backend="cpu")
    assert torch.equal(spikes, reference)
    assert torch.equal(v_end, v_reference)


def test_segments_keep_a_nan_where_it_belongs(with_threads):
    x, v = drives("random", 33)
    x[0, 200, 7] = torch.nan
    one, _ = with_threads(1, lif, x, v, backend="cpu")
    other, _ = with_threads(8, lif, x, v, backend="cpu")
    assert torch.equal(one.isnan(), other.isnan())
    assert int(other.isnan().sum()) == 800
    assert torch.equal(one.nan_to_num(), other.nan_to_num())


def backward_results(x, v, reset, grad_s, grad_v, tau, mode, alpha):
    """Gradients of x and v, and of tau and threshold where tau is None: one a channel, learnt."""
    from spikescale.kernels.lif.cpu import lif_backward, lif_forward

    tensors = (None, None) if tau is not None else learned_neurons(x.shape[2], False)
    options = (tau or 1.0, 1.0, 0.0, *mode.values(), alpha)
    _, _, marks = lif_forward(x, v, reset, *tensors, *options, True, "cpu-plain")
    given = (x, reset, *tensors, marks, grad_s, grad_v)
    return lif_backward(*given, *options, tau is None, "cpu-plain")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tau", "alpha"), [(2.0, 2.0), (3.7, 4.0), (2.0, 8.0), (None, 2.0)])
@pytest.mark.parametrize("kind", ["random", "steady", "constant"])
def test_segments_of_time_give_the_gradients_of_one_pass_bit_for_bit(kind, tau, alpha, mode, with_threads):
    from spikescale.kernels.lif.cpu import library

    generator = torch.Generator().manual_seed(2)
    reset = torch.rand(1, 1100, generator=generator) < 0.003
    for channels, dtype, segments in ((16, torch.float32, 8), (33, torch.bfloat16, 2)):
        assert library("cpu-plain").lif_backward_segments(1, 1100, channels, 8) == segments
        x, v = drives(kind, channels, dtype, 1100)
        grad_s, grad_v = torch.randn(x.shape, generator=generator).to(dtype), torch.randn(1, channels)
        # Gradients of the last membrane alone die away, or grow, through every segment.
        for mask, grads in ((None, grad_s), (reset, grad_s), (None, torch.zeros_like(grad_s))):
            arguments = (x, v, mask, grads, grad_v, tau, mode, alpha)
            whole = with_threads(1, backward_results, *arguments)
            cut = with_threads(8, backward_results, *arguments)
            for one, other in zip(whole, cut, strict=True):
                assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
                assert one.isfinite().any() or one.numel() == 0


@pytest.mark.parametrize("shape", [(1, 1000, 33), (3, 200, 100)])
def test_results_do_not_depend_on_the_number_of_threads(shape, with_threads):
    x, v, reset = make_inputs(*shape)
    neurons = learned_neurons(shape[2], False)
    results = [
        with_threads(threads, evaluate_learned, x, v, reset, *neurons, torch.float32, backend="cpu")
        for threads in (1, 2, 8)
    ]
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)


def test_only_the_input_and_a_sixteenth_of_it_are_kept_for_backward():
    saved = []
    x = torch.randn(2, 64, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lif(x, backend="cpu")
    assert sorted(t.numel() for t in saved if t is not None) == [x.numel() // 16, x.numel()]


def test_torch_accepts_the_operator_registration():
    from spikescale.kernels.lif.cpu import lif_forward

    x, v, reset = make_inputs(2, 20, 5)
    tau, threshold = learned_neurons(5, False)
    options = (2.0, 1.0, 0.0, False, False, 2.0)
    leaves = [tensor.requires_grad_() for tensor in (x.clone(), v.clone(), tau, threshold)]
    torch.library.opcheck(lif_forward, (*leaves[:2], reset, *leaves[2:], *options, True, "cpu-plain"))
    torch.library.opcheck(lif_forward, (x, v, None, None, None, *options, False, "cpu-plain"))


def test_an_empty_batch_gives_empty_results_and_no_gradient():
    x, tau = torch.zeros(0, 5, 3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    spikes, v = lif(x, tau=tau, backend="cpu")
    assert (spikes.shape, v.shape) == ((0, 5, 3), (0, 3))
    spikes.sum().backward()
    assert x.grad.shape == (0, 5, 3)
    assert tau.grad.tolist() == [0, 0, 0]


def test_wrong_shapes_are_refused():
    x, v, _ = make_inputs(1, 4, 3)
    with pytest.raises(ValueError, match="v must be"):
        lif(x, v[:, :2])
    with pytest.raises(ValueError, match="reset must be"):
        lif(x, v, reset=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="time >= 1"):
        lif(x[:, :0], v)
    with pytest.raises(ValueError, match="tau must be"):
        lif(x, v, tau=torch.ones(2))


def test_heaviside_steps_at_zero_and_backpropagates_the_arctangent_derivative():
    x = torch.tensor([-2.0, -0.1, 0.0, 0.3, torch.nan], requires_grad=True)
    spikes = heaviside(x, alpha=2.0)
    assert spikes[:4].tolist() == [0, 0, 1, 1]
    assert spikes[4].isnan()
    assert heaviside(x, strict=True)[:4].tolist() == [0, 0, 0, 1]
    spikes.backward(torch.ones(5))
    expected = 1 / (1 + (math.pi * x.detach()) ** 2)
    torch.testing.assert_close(x.grad, expected, equal_nan=True)
