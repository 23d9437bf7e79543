"""LayerNorm in C++ and in fla's kernels against float64; which of them runs is what was said."""

import logging
import os

import pytest
import torch
from torch.nn import functional as F

from spikescale.errors import UserError
from spikescale.kernels import backend as backends
from spikescale.kernels.build import instruction_sets
from spikescale.kernels.layer_norm import layer_norm

CPU = [f"cpu-{name}" for name in instruction_sets()]
CHANNELS = [1, 7, 33, 64, 100, 1792]


def make_inputs(*shape, mean=0.0):
    generator = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=generator) + mean
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    return x, weight, bias, torch.randn(shape, generator=generator)


def evaluate(function, x, weight, bias, grad, dtype=torch.float32):
    leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (x, weight, bias)]
    y = function(*leaves)
    y.backward(grad.to(dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def in_torch(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def on(backend):
    return lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5, backend)


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-3))


@pytest.fixture
def with_threads():
    """Runs a function with so many torch threads."""
    before = torch.get_num_threads()

    def run(threads, function, *arguments):
        torch.set_num_threads(threads)
        return function(*arguments)

    yield run
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("channels", CHANNELS)
def test_output_and_gradients_equal_float64(channels, mean, backend):
    for shape in ((1, channels), (2, 63, channels), (1, 300, channels), (channels,)):
        inputs = make_inputs(*shape, mean=mean)
        results = evaluate(on(backend), *inputs)
        expected = evaluate(in_torch, *inputs, dtype=torch.float64)
        assert results[0].shape == shape
        for actual, wanted in zip(results, expected, strict=True):
            assert relative(actual, wanted) <= 1e-5


@pytest.mark.parametrize("channels", CHANNELS)
def test_all_instruction_sets_give_the_same_bits(channels):
    inputs = make_inputs(2, 63, channels)
    results = [evaluate(on(backend), *inputs) for backend in CPU]
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)


def test_results_do_not_depend_on_the_number_of_threads(with_threads):
    inputs = make_inputs(3, 1000, 33)
    results = [with_threads(threads, evaluate, on("cpu"), *inputs) for threads in (1, 2, 8)]
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 70, 99])
def test_a_value_that_is_not_finite_spoils_its_row_and_no_other(value, place, backend):
    x, weight, bias, _ = make_inputs(5, 100)
    x[2, place] = value
    y = layer_norm(x, weight, bias, backend=backend)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


def test_equal_channels_give_the_bias():
    y = layer_norm(torch.full((2, 40), 7.25), torch.ones(40), torch.arange(40.0), backend="cpu")
    assert torch.equal(y, torch.arange(40.0).expand(2, 40))


def test_non_contiguous_input_gives_the_same():
    x, weight, bias, grad = make_inputs(2, 66, 40)
    strided = evaluate(on("cpu"), x.transpose(1, 2), weight.repeat(2)[:66], bias.repeat(2)[:66], grad.mT)
    plain = evaluate(
        on("cpu"), x.mT.contiguous(), weight.repeat(2)[:66], bias.repeat(2)[:66], grad.mT.contiguous()
    )
    for one, other in zip(strided, plain, strict=True):
        assert torch.equal(one, other)


def test_only_the_input_and_two_numbers_a_row_are_kept_for_backward():
    saved = []
    x, weight, bias, _ = make_inputs(50, 40)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_norm(x.requires_grad_(), weight, bias, backend="cpu")
    assert sorted(tensor.numel() for tensor in saved) == [40, 50, 50, 2000]


def test_torch_accepts_the_operator_registration():
    from spikescale.kernels.layer_norm.cpu import layer_norm_forward

    leaves = [tensor.requires_grad_() for tensor in make_inputs(2, 5, 33)[:3]]
    torch.library.opcheck(layer_norm_forward, (*leaves, 1e-5, "cpu-plain"))


def test_wrong_shapes_are_refused():
    x, weight, bias, _ = make_inputs(2, 33)
    with pytest.raises(ValueError, match="weight and bias must be"):
        layer_norm(x, weight[:5], bias)
    with pytest.raises(ValueError, match="weight and bias must be"):
        layer_norm(x.double(), weight, bias)


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: run pytest without -m gpu"
)
without_gpu = pytest.mark.filterwarnings("ignore:Triton is not supported")


@interpreted
@without_gpu
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(
    ("shape", "programs"), [((1, 1), 4), ((2, 9, 33), 4), ((7,), 1), ((1, 13, 100), 3), ((1, 11, 600), 5)]
)
def test_flas_kernels_give_the_output_and_gradients_of_float64(shape, programs, mean, monkeypatch):
    from triton_harness import checked_memory

    from spikescale.kernels.layer_norm import triton

    monkeypatch.setattr(triton, "PROGRAMS", 1)
    monkeypatch.setattr(triton.gpu, "multiprocessors", lambda device: programs)
    inputs = make_inputs(*shape, mean=mean)
    with checked_memory(seed=len(shape)):
        results = evaluate(on("triton"), *inputs)
    expected = evaluate(in_torch, *inputs, dtype=torch.float64)
    assert results[0].shape == shape
    for actual, wanted in zip(results, expected, strict=True):
        assert relative(actual, wanted) <= 1e-5


@interpreted
@without_gpu
def test_flas_kernels_are_torch_operators_and_take_strided_and_narrow_tensors():
    from triton_harness import bf16_rounding

    from spikescale.kernels.layer_norm.triton import layer_norm_forward

    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [tensor.requires_grad_() for tensor in make_inputs(2, 5, 33)[:3]]
    torch.library.opcheck(layer_norm_forward, (*leaves, 1e-5), test_utils=checks)
    x, weight, bias, grad = make_inputs(2, 33, 5)
    x, weight, bias, grad = x.mT, weight.repeat(7)[:33], bias.repeat(7)[:33], grad.mT
    strided = evaluate(on("triton"), x, weight, bias, grad)
    plain = evaluate(on("triton"), x.contiguous(), weight, bias, grad.contiguous())
    for one, other in zip(strided, plain, strict=True):
        assert torch.equal(one, other)
    with bf16_rounding():
        narrow = evaluate(on("triton"), x, weight, bias, grad, torch.bfloat16)
    for one, other in zip(narrow, plain, strict=True):
        assert one.dtype == torch.bfloat16
        assert relative(one, other.double()) <= 2e-2


def said(caplog, backend, x):
    """What is announced by one call, and the call's result."""
    backends._announce.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, "spikescale.kernels"):
        chosen = backends.choose_backend("layer_norm", backend, *x)
    return chosen, [record.getMessage() for record in caplog.records]


def test_a_named_backend_is_used_or_refused_and_auto_says_when_it_takes_torchs_own(caplog, monkeypatch):
    narrow = torch.zeros(2, 3, dtype=torch.bfloat16), *torch.zeros(2, 3, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="C\\+\\+ backend takes float32, not bfloat16"):
        layer_norm(*narrow, backend="cpu")
    chosen, lines = said(caplog, "auto", ("cpu", torch.bfloat16))
    assert chosen == "reference"
    assert lines == [
        "layer_norm: backend reference for bfloat16 tensors on cpu"
        " (torch's own, as the C++ backend takes float32, not bfloat16)"
    ]
    assert layer_norm(*narrow).dtype == torch.bfloat16
    monkeypatch.setattr(backends, "_has_fla", lambda: False)
    chosen, lines = said(caplog, "auto", ("cuda", torch.float32))
    assert chosen == "reference"
    assert "(torch's own, as flash-linear-attention is not installed" in lines[0]
    with pytest.raises(UserError, match="'triton' of layer_norm: flash-linear-attention is not installed"):
        backends.choose_backend("layer_norm", "triton", "cuda", torch.float32)
    monkeypatch.undo()
    assert said(caplog, "auto", ("cuda", torch.float32))[0] == "triton"


def test_without_a_compiler_auto_takes_torchs_own_and_does_not_call_it_slow(caplog, monkeypatch):
    def refuse(operator, backend):
        raise backends.BuildError("no C++ compiler")

    monkeypatch.setattr(backends, "_load_cpu", refuse)
    chosen, lines = said(caplog, "auto", ("cpu", torch.float32))
    assert chosen == "reference"
    assert lines == [
        "layer_norm: backend reference for float32 tensors on cpu (torch's own, as no C++ compiler)"
    ]
