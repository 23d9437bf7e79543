"""The fused neurons, residual, dropout and LayerNorm: against the definition, and against its C++ parts."""

import functools

import pytest
import torch

from spikescale.kernels.build import instruction_sets
from spikescale.kernels.layer_norm import layer_norm
from spikescale.kernels.lif import lif
from spikescale.kernels.lif_norm import lif_residual_norm
from spikescale.kernels.lif_norm.reference import dropout_keep

CPU = [f"cpu-{name}" for name in instruction_sets()]
SHAPES = [(1, 1, 1), (2, 63, 33), (1, 63, 100), (2, 1000, 33)]
SEED = 0x1234_5678_9ABC_DEF0
NAMES = ("x", "current", "v", "weight", "bias", "tau", "v_threshold")


def make_inputs(batch, length, channels):
    """The seven tensors of NAMES, and reset. All on a coarse grid, tau a power of two: float32 and float64
    compute the same membranes and so the same spikes."""
    generator = torch.Generator().manual_seed(length + channels)

    def random(*shape):
        return (torch.randn(shape, generator=generator) * 8).round() / 8

    wide = (batch, length, channels)
    x, current, v = random(*wide), random(*wide) * 2 + 0.5, random(batch, channels) / 2
    tau = 2.0 ** torch.randint(0, 3, (channels,), generator=generator)
    threshold = torch.randint(4, 12, (channels,), generator=generator) / 8
    tensors = (x, current, v, random(channels), random(channels), tau, threshold)
    return tensors, torch.rand(batch, length, generator=generator) < 0.1


def evaluate(tensors, reset, dtype=torch.float32, current_dtype=None, used=(True, True, True), **options):
    """The outputs and the gradients of all seven tensors; `used`: which outputs the loss looks at."""
    leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
    current = leaves[1].to(current_dtype or dtype)
    outputs = lif_residual_norm(
        leaves[0], current, *leaves[2:5], tau=leaves[5], v_threshold=leaves[6], reset=reset, **options
    )
    generator = torch.Generator().manual_seed(7)
    grads = [None if out is None else torch.randn(out.shape, generator=generator) for out in outputs]
    pairs = [
        (o, g.to(dtype)) for o, g, use in zip(outputs, grads, used, strict=True) if use and o is not None
    ]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return [None if o is None else o.detach() for o in outputs], [
        None if leaf is None else leaf.grad for leaf in leaves
    ]


@functools.cache
def reference_results(shape, dtype, dropout, soft_reset, detach_reset):
    options = {"dropout": dropout, "soft_reset": soft_reset, "detach_reset": detach_reset}
    return evaluate(*make_inputs(*shape), dtype, seed=SEED, backend="reference", **options)


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-3))


def assert_same(one, other):
    for first, second in zip(one, other, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)


@pytest.fixture
def with_threads():
    """Runs a function with so many torch threads."""
    before = torch.get_num_threads()

    def run(threads, function, *arguments, **options):
        torch.set_num_threads(threads)
        return function(*arguments, **options)

    yield run
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dropout", "soft_reset", "detach_reset"),
    [(0.0, False, False), (0.3, False, True), (0.3, True, False), (0.0, True, True)],
)
def test_outputs_and_gradients_equal_the_reference(shape, dropout, soft_reset, detach_reset, backend):
    mode = {"dropout": dropout, "soft_reset": soft_reset, "detach_reset": detach_reset}
    outputs, grads = evaluate(*make_inputs(*shape), seed=SEED, backend=backend, **mode)
    (x_out, normed, v_out), _ = reference_results(shape, torch.float32, *mode.values())
    assert torch.equal(outputs[0], x_out)
    assert relative(outputs[1], normed) <= 1e-5
    assert torch.equal(outputs[2], v_out)
    exact_outputs, exact_grads = reference_results(shape, torch.float64, *mode.values())
    for actual, wanted in zip(outputs, exact_outputs, strict=True):
        assert relative(actual, wanted) <= 1e-5
    for name, actual, wanted in zip(NAMES, grads, exact_grads, strict=True):
        assert relative(actual, wanted) <= 1e-5, name


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("current_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [2.0, 3.7])
def test_fused_and_unfused_give_the_same_bits(tau, current_dtype, backend):
    for shape in ((1, 1, 1), (2, 63, 33), (1, 100, 100)):
        (x, current, v, weight, bias, _, _), reset = make_inputs(*shape)
        leaves = [t.clone().requires_grad_() for t in (x, current.to(current_dtype), v)]
        parts = [t.detach().clone().requires_grad_() for t in leaves]
        options = {"tau": tau, "v_reset": 0.1, "reset": reset, "backend": backend}
        fused = lif_residual_norm(leaves[0], leaves[1], leaves[2], weight, bias, **options)
        spikes, v_out = lif(parts[1], parts[2], **options)
        x_out = parts[0] + spikes.float()
        unfused = (x_out, layer_norm(x_out, weight, bias, backend=backend), v_out)
        assert_same(fused, unfused)
        if current_dtype == torch.float32:  # else the sum of the spikes' gradients is rounded on its way
            grads = [torch.randn(out.shape, generator=torch.Generator().manual_seed(2)) for out in fused]
            torch.autograd.backward(fused, grads)
            torch.autograd.backward(unfused, grads)
            assert_same([t.grad for t in leaves], [t.grad for t in parts])


@pytest.mark.parametrize("shape", [(1, 1000, 33), (2, 300, 100), (3, 600, 33)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_results_do_not_depend_on_the_number_of_threads(shape, dropout, with_threads):
    # One pass where the batch keeps the threads busy, two phases where it does not, segments of time for
    # 8 threads and one block of channels.
    tensors, reset = make_inputs(*shape)
    reset &= torch.rand(reset.shape, generator=torch.Generator().manual_seed(1)) < 0.05
    options = {"dropout": dropout, "seed": SEED, "backend": "cpu"}
    results = [with_threads(threads, evaluate, tensors, reset, **options) for threads in (1, 2, 8)]
    for outputs, grads in results[1:]:
        assert_same(results[0][0], outputs)
        assert_same(results[0][1], grads)


def test_segments_of_time_that_never_meet_are_run_again(with_threads):
    # A constant drive: started early from 0, a segment fires out of step with the true neurons.
    x, v = torch.zeros(1, 1000, 33), torch.linspace(0, 0.9, 33)[None]
    current = torch.full((1, 1000, 33), 1.15)
    one, _, v_one = with_threads(1, lif_residual_norm, x, current, v, None, None, backend="cpu")
    cut, _, v_cut = with_threads(8, lif_residual_norm, x, current, v, None, None, backend="cpu")
    assert torch.equal(one, cut)
    assert torch.equal(v_one, v_cut)


def test_bfloat16_current_equals_the_same_numbers_in_float32():
    tensors, reset = make_inputs(2, 63, 100)
    low, low_grads = evaluate(tensors, reset, current_dtype=torch.bfloat16, backend="cpu")
    high, high_grads = evaluate(tensors, reset, backend="cpu")
    assert_same(low, high)
    assert torch.equal(low_grads[1], high_grads[1].bfloat16().float())
    assert_same(low_grads[:1] + low_grads[2:], high_grads[:1] + high_grads[2:])


@pytest.mark.parametrize("used", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_loss_on_one_output_alone_has_the_reference_gradients(used):
    tensors, reset = make_inputs(2, 63, 33)
    _, grads = evaluate(tensors, reset, used=used, dropout=0.3, seed=SEED, backend="cpu")
    _, expected = evaluate(
        tensors, reset, torch.float64, used=used, dropout=0.3, seed=SEED, backend="reference"
    )
    for actual, wanted in zip(grads, expected, strict=True):
        assert (
            (actual is None or actual.abs().max() == 0)
            if wanted is None
            else relative(actual, wanted) <= 1e-5
        )


def test_without_weight_there_is_no_layer_norm():
    tensors, reset = make_inputs(2, 63, 33)
    tensors = (*tensors[:3], None, None, *tensors[5:])
    outputs, grads = evaluate(tensors, reset, dropout=0.3, seed=SEED, backend="cpu")
    expected, exact = evaluate(tensors, reset, torch.float64, dropout=0.3, seed=SEED, backend="reference")
    assert outputs[1] is None
    for actual, wanted in zip(outputs + grads, expected + exact, strict=True):
        assert (actual is None) == (wanted is None)
        assert wanted is None or relative(actual, wanted) <= 1e-5


def test_dropout_keeps_the_share_it_should_and_another_seed_other_elements():
    shape = torch.Size((1, 100, 1000))
    masks = [dropout_keep(shape, 0.3, seed) for seed in (0, 1, 1 << 32, SEED)]
    for mask in masks:
        assert abs(float(mask.double().mean()) - 0.7) < 0.005
        assert abs(float((mask[..., 1:] == mask[..., :-1]).double().mean()) - 0.58) < 0.006
    for first, second in ((0, 1), (0, 2), (1, 3)):
        assert abs(float((masks[first] == masks[second]).double().mean()) - 0.58) < 0.006
    x = torch.ones(shape)
    out, _, _ = lif_residual_norm(
        x, torch.zeros(shape), None, None, None, dropout=0.3, seed=SEED, backend="cpu"
    )
    assert torch.equal(out != 0, masks[3])
    assert torch.equal(out[masks[3]], torch.full_like(out[masks[3]], 1 / 0.7))


@pytest.mark.parametrize("backend", ["reference", *CPU])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_nan_membrane_is_visible_in_the_residual_stream(dropout, backend):
    (x, current, v, weight, bias, _, _), _ = make_inputs(1, 10, 33)
    current[0, 4, 7] = torch.nan
    x_out, normed, v_out = lif_residual_norm(
        x, current, v, weight, bias, dropout=dropout, seed=3, backend=backend
    )
    assert x_out[0, 4:, 7].isnan().all()
    assert v_out[0, 7].isnan()
    assert normed[0, 4:].isnan().all()
    assert normed[0, :4].isfinite().all()
    assert x_out[0, :, torch.arange(33) != 7].isfinite().all()


def test_chunks_equal_the_whole_and_resets_separate_documents():
    (x, current, v, weight, bias, _, _), _ = make_inputs(2, 50, 33)

    def run(start, stop, membrane, reset=None):
        return lif_residual_norm(
            x[:, start:stop], current[:, start:stop], membrane, weight, bias, reset=reset, backend="cpu"
        )

    whole = run(0, 50, v)
    first = run(0, 20, v)
    second = run(20, 50, first[2])
    for index in (0, 1):
        assert torch.equal(torch.cat([first[index], second[index]], 1), whole[index])
    assert torch.equal(second[2], whole[2])
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[:, 20] = True
    cut, alone = run(0, 50, v, reset), run(20, 50, None)
    assert torch.equal(cut[0], torch.cat([first[0], alone[0]], 1))
    assert torch.equal(cut[2], alone[2])


def test_non_contiguous_inputs_give_the_same():
    (x, current, v, weight, bias, _, _), _ = make_inputs(2, 40, 66)
    strided = (
        x[..., ::2],
        current.transpose(0, 1)[..., ::2].transpose(0, 1),
        v[:, ::2],
        weight[::2],
        bias[::2],
    )
    assert_same(
        lif_residual_norm(*strided, backend="cpu"),
        lif_residual_norm(*(tensor.contiguous() for tensor in strided), backend="cpu"),
    )


def test_backward_keeps_the_output_the_current_and_a_sixteenth():
    saved = []
    (x, current, v, weight, bias, _, _), _ = make_inputs(2, 64, 40)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lif_residual_norm(x.requires_grad_(), current, v, weight, bias, dropout=0.1, backend="cpu")
    sizes = sorted(tensor.numel() for tensor in saved if tensor is not None)
    assert sizes == [40, 128, 128, x.numel() // 16, x.numel(), x.numel()]


def test_torch_accepts_the_operator_registration():
    from spikescale.kernels.lif_norm.cpu import lif_norm_forward

    tensors, reset = make_inputs(2, 5, 33)
    x, current, v, weight, bias, tau, threshold = (tensor.requires_grad_() for tensor in tensors)
    neuron = (2.0, 1.0, 0.0, False, False, 2.0)
    options = (*neuron, 1e-5, 0.3, SEED, True, "cpu-plain")
    everything = (x, current, v, weight, bias, reset, tau, threshold, *options)
    torch.library.opcheck(lif_norm_forward, everything)
    least = (x.detach(), current.detach(), v.detach(), *[None] * 5, *neuron, 1e-5, 0.0, 0, False, "cpu-plain")
    torch.library.opcheck(lif_norm_forward, least)


def test_wrong_inputs_are_refused():
    (x, current, v, weight, bias, _, _), _ = make_inputs(1, 4, 3)
    with pytest.raises(ValueError, match="x and current must be"):
        lif_residual_norm(x, current[:, :2], v, weight, bias)
    with pytest.raises(ValueError, match="weight and bias must be given together"):
        lif_residual_norm(x, current, v, weight, None)
    with pytest.raises(ValueError, match="dropout must be"):
        lif_residual_norm(x, current, v, weight, bias, dropout=1.0)
