"""LIF in Triton, interpreted: both forms bit for bit against the reference, and planted errors found."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import triton  # noqa: F401
from triton.runtime import interpreter
from triton_harness import MemoryViolation, bf16_rounding, checked_memory, mutated

from spikescale.errors import UserError
from spikescale.kernels.lif import lif
from spikescale.kernels.lif.reference import lif_reference
from spikescale.kernels.lif.triton import choose_form, lif_triton, warm_up

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: run pytest without -m gpu"
)

MODULES = [f"spikescale.kernels.lif.{name}" for name in ("triton_sequential", "triton_parallel", "triton")]
FORMS = [{"form": "sequential"}, {"form": "parallel", "chunk": 32}]
HARD, HARD_DETACHED, SOFT, SOFT_DETACHED = (False, False), (False, True), (True, False), (True, True)
PLAIN = (2.0, 1.0, 0.0, *HARD, 2.0)
# tau, v_threshold, v_reset, soft_reset, detach_reset, surrogate_alpha; "learnt": a number's neighbours, one a
# channel. With 1.25 or 3.7 a division rounds; alpha 4 and tau 8 make a backward step that can expand.
NEURONS = {
    "hard": PLAIN,
    "hard-detached": (2.0, 1.0, 0.0, *HARD_DETACHED, 2.0),
    "soft": (2.0, 1.0, 0.0, *SOFT, 2.0),
    "soft-detached": (2.0, 1.0, 0.0, *SOFT_DETACHED, 2.0),
    "hard-3.7": (3.7, 0.8, -0.2, *HARD, 4.0),
    "hard-detached-1.25": (1.25, 0.8, 0.1, *HARD_DETACHED, 2.0),
    "soft-3.7": (3.7, 0.8, -0.2, *SOFT, 4.0),
    "soft-detached-8": (8.0, 0.8, 0.1, *SOFT_DETACHED, 4.0),
    "hard-learnt": ("learnt", "learnt", -0.2, *HARD, 4.0),
    "hard-detached-learnt": ("learnt", "learnt", 0.1, *HARD_DETACHED, 2.0),
    "soft-learnt": ("learnt", "learnt", 0.1, *SOFT, 4.0),
    "soft-detached-learnt": ("learnt", "learnt", 0.0, *SOFT_DETACHED, 2.0),
}


@pytest.fixture(autouse=True)
def quick_device_functions(monkeypatch):
    # The interpreter patches triton.language again at every call of a device function, for a third of the
    # time. For those that see what the kernels see, the launch has done so already.
    call = interpreter.InterpretedFunction.__call__

    def quick(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("spikescale.")
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", quick)


@pytest.fixture
def short_warm_up(monkeypatch):
    # Else a guess needs a hundred tokens. The number decides the time, not the result.
    monkeypatch.setattr(f"{MODULES[2]}.warm_up", lambda tau: 32)


def make_inputs(batch, length, channels):
    generator = torch.Generator().manual_seed(length + channels)
    x = torch.randn(batch, length, channels, generator=generator) * 2 + 0.5
    v = torch.randn(batch, channels, generator=generator) * 0.5
    reset = torch.rand(batch, length, generator=generator) < 0.05
    return x, v, reset


def make_neuron(neuron, channels, dtype=torch.float32):
    """The neuron with its learnt parameters as leaves of `dtype`, and those leaves."""
    spread = torch.linspace(-0.3, 0.7, channels).to(dtype)
    learnt = [(2.2 + spread).requires_grad_(), (0.9 + spread / 4).requires_grad_()]
    if neuron[0] == "learnt":
        return (*learnt, *neuron[2:]), learnt
    return neuron, []


def evaluate(function, x, v, reset, neuron, dtype=torch.float32, **options):
    """[spikes, final v] and the gradients of x, v and what is learnt, all inputs rounded to `dtype`."""
    neuron, learnt = make_neuron(neuron, x.shape[2], dtype)
    x, v = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, v))
    outputs = function(x, v, reset, *neuron, **options)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(output.shape, generator=generator).to(dtype) for output in outputs]
    return [output.detach() for output in outputs], torch.autograd.grad(outputs, [x, v, *learnt], grads)


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def assert_equals_reference(x, v, reset, neuron, function=lif_triton, **options):
    outputs, grads = evaluate(function, x, v, reset, neuron, **options)
    expected, _ = evaluate(lif_reference, x, v, reset, neuron)
    exact, exact_grads = evaluate(lif_reference, x, v, reset, neuron, torch.float64)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(expected[0].double(), exact[0])  # else the gradients are those of other spikes
    for name, actual, wanted in zip(("x", "v", "tau", "v_threshold"), grads, exact_grads, strict=False):
        assert relative(actual, wanted) <= 1e-5, name


@pytest.mark.usefixtures("short_warm_up")
@pytest.mark.parametrize("form", FORMS, ids=["sequential", "parallel"])
@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)
def test_fires_bit_for_bit_like_the_reference_and_has_the_float64_gradients(neuron, form):
    assert_equals_reference(*make_inputs(1, 70, 33), neuron, **form)


@pytest.mark.parametrize("form", FORMS, ids=["sequential", "parallel"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 63, 100), (2, 64, 5)])
def test_odd_shapes(shape, form):
    x, v, _ = make_inputs(*shape)
    assert_equals_reference(x, v, None, NEURONS["hard-learnt"], **form)


@pytest.mark.slow
def test_ten_chunks_of_which_some_merge_and_the_last_is_not_whole():
    x, v, reset = make_inputs(1, 300, 33)
    reset[:, 150:] = False
    x[:, 150:] = drives(150, 33)[1]
    assert_equals_reference(x, v, reset, PLAIN, **FORMS[1])


def drives(length, channels):
    """Rows: random; constant, with orbits whose phase depends on where they start; nearly constant."""
    constant = torch.linspace(1.02, 2.9, channels).expand(length, channels)
    noise = torch.randn(2, length, channels, generator=torch.Generator().manual_seed(0))
    return torch.stack([2 * noise[0] + 0.5, constant, constant + 1e-3 * noise[1]])


@pytest.mark.usefixtures("short_warm_up")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
        for name in ("hard", "hard-3.7", "hard-learnt", "soft", "soft-3.7", "soft-learnt")
        for dtype in (torch.float32, torch.bfloat16 if "hard" in name else torch.float16)
    ],
)
def test_parallel_equals_sequential_bit_for_bit_also_where_chunks_never_merge(name, dtype):
    x = drives(90, 33).to(dtype)
    reset = torch.zeros(3, 90, dtype=torch.bool)
    reset[0] = make_inputs(1, 90, 33)[2]  # in the others it would make the chunks merge
    v = torch.linspace(-0.5, 0.9, 99).view(3, 33)
    neuron, _ = make_neuron(NEURONS[name], 33)
    with torch.no_grad():
        spikes, v_out = lif_triton(x, v, reset, *neuron, form="sequential")
        parallel = lif_triton(x, v, reset, *neuron, form="parallel", chunk=32)
        wanted = lif_reference(x, v, reset, *neuron)
    assert spikes.dtype == dtype
    assert torch.equal(parallel[0], spikes)
    assert torch.equal(parallel[1].view(torch.int32), v_out.view(torch.int32))
    assert torch.equal(spikes, wanted[0])
    assert torch.equal(v_out, wanted[1])


def late_merging(length):
    """A silent stretch across the third chunk's start, so that its guess is wrong, then all fire at once."""
    x = torch.full((1, length, 33), 0.3)
    x[:, 200::3] = 40.0
    return x, torch.linspace(0.1, 0.7, 33)[None], (torch.full((33,), 20.0), torch.ones(33), *PLAIN[2:])


def test_a_chunk_that_merges_on_its_way_keeps_what_was_computed_after_that():
    x, v, neuron = late_merging(250)
    with torch.no_grad():
        parallel = lif_triton(x, v, None, *neuron, form="parallel", chunk=96)
        expected = lif_reference(x, v, None, *neuron)
    assert torch.equal(parallel[0], expected[0])
    assert torch.equal(parallel[1], expected[1])


@pytest.mark.usefixtures("short_warm_up")
@pytest.mark.parametrize("form", FORMS, ids=["sequential", "parallel"])
def test_programs_stay_in_their_memory_in_any_order(form):
    x, v, reset = make_inputs(2, 70, 70)
    x[1] = drives(70, 70)[1]
    with checked_memory(seed=0):
        assert_equals_reference(x, v, reset, NEURONS["hard-learnt"], **form)


@pytest.mark.parametrize("form", FORMS, ids=["sequential", "parallel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_is_float32_inside_and_rounds_once(dtype, form):
    x, v, reset = make_inputs(1, 70, 33)
    x = x.to(dtype)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for inside in (dtype, torch.float32):
        leaf = x.detach().to(inside).requires_grad_()
        with bf16_rounding():
            spikes, v_out = lif_triton(leaf, v, reset, *PLAIN, **form)
            spikes.backward(grad.to(inside))
        results.append((spikes, v_out, leaf.grad))
    (low, v_low, grad_low), (high, v_high, grad_high) = results
    assert (low.dtype, v_low.dtype) == (dtype, torch.float32)
    assert torch.equal(low.float(), high)
    assert torch.equal(v_low, v_high)
    assert torch.equal(grad_low, grad_high.to(dtype))
    assert set(low.unique().tolist()) == {0.0, 1.0}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("form", FORMS, ids=["sequential", "parallel"])
def test_nan_and_infinity_stay_visible(form):
    x, v, _ = make_inputs(1, 70, 33)
    x[0, 4, 7], x[0, 40, 8], x[0, 50, 9] = torch.nan, torch.inf, -torch.inf
    for soft_reset in (False, True):
        neuron = (2.0, 1.0, 0.0, soft_reset, False, 2.0)
        outputs, (grad_x, _) = evaluate(lif_triton, x, v, None, neuron, **form)
        expected, (wanted_x, _) = evaluate(lif_reference, x, v, None, neuron)
        for actual, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(grad_x.isnan(), wanted_x.isnan())
        assert outputs[0][0, 4:, 7].isnan().all()


def test_a_carried_state_continues_and_a_reset_separates():
    x, v, _ = make_inputs(1, 80, 33)
    whole, v_end = lif(x, v, backend="triton")
    first, carried = lif(x[:, :41], v, backend="triton")
    second, carried = lif(x[:, 41:], carried, backend="triton")
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(carried, v_end)
    reset = torch.zeros(1, 80, dtype=torch.bool)
    reset[:, 41] = True
    cut, _ = lif_triton(x, v, reset, *PLAIN, **FORMS[1])
    alone, _ = lif(x[:, 41:], backend="triton")
    assert torch.equal(cut, torch.cat([first, alone], 1))
    assert not torch.equal(alone, second)


@pytest.mark.parametrize("form", FORMS, ids=["sequential", "parallel"])
def test_non_contiguous_tensors_give_the_same(form):
    x, v, reset = make_inputs(2, 40, 10)
    strided = torch.stack([x, -x], -1).permute(1, 2, 0, 3)[..., 0].requires_grad_()
    leaf = x.clone().requires_grad_()
    columns = torch.stack([v, -v], -1)[..., 0]
    rows = torch.stack([reset, ~reset], -1)[..., 0]
    a, v_a = lif_triton(strided.permute(2, 0, 1), columns, rows, *PLAIN, **form)
    b, v_b = lif_triton(leaf, v, reset, *PLAIN, **form)
    assert torch.equal(a, b)
    assert torch.equal(v_a, v_b)
    a.sum().backward()  # an expanded gradient: all strides 0
    b.backward(torch.ones_like(b))
    assert torch.equal(strided.grad.permute(2, 0, 1), leaf.grad)


@pytest.mark.parametrize("form", FORMS, ids=["sequential", "parallel"])
def test_a_gradient_of_only_one_output_is_enough(form):
    x, v, _ = make_inputs(1, 40, 5)
    for output in (0, 1):
        grads = []
        for function, options in ((lif_triton, form), (lif_reference, {})):
            leaf = x.clone().requires_grad_()
            function(leaf, v, None, *PLAIN, **options)[output].sum().backward()
            grads.append(leaf.grad)
        assert relative(*grads) <= 1e-6


def test_torch_accepts_the_operator_registration():
    from spikescale.kernels.lif.triton import lif_triton_forward

    x, v, reset = make_inputs(1, 33, 5)
    leaves = [tensor.requires_grad_() for tensor in (x, v)]
    learnt = [torch.full((5,), value).requires_grad_() for value in (2.5, 0.9)]
    numbers = (0.0, 0.0, 0.0, False, False, 2.0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        lif_triton_forward, (*leaves, reset, *learnt, *numbers, "parallel", 32, True), test_utils=checks
    )


@pytest.mark.parametrize("form", FORMS, ids=["sequential", "parallel"])
def test_no_gradient_in_gives_none_out_though_chunks_would_amplify_it(form):
    # At the threshold f is 32, and a token multiplies by -16: 1e38 after 32 of them.
    leaf = torch.full((1, 64, 2), 2.0, requires_grad=True)
    spikes, v = lif_triton(leaf, torch.zeros(1, 2), None, 2.0, 1.0, 0.0, *HARD, 64.0, **form)
    grads = [torch.zeros_like(spikes), torch.zeros_like(v)]
    (grad,) = torch.autograd.grad([spikes, v], leaf, grads)
    assert not grad.any()


@pytest.mark.slow
def test_torch_compile_traces_forward_and_backward():
    x, v, _ = make_inputs(1, 33, 5)
    learnt = [torch.full((5,), value).requires_grad_() for value in (2.5, 0.9)]

    def loss(x):
        return lif_triton(x, v, None, *learnt, *PLAIN[2:], **FORMS[1])[0].mul(2).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(call(x.requires_grad_()), [x, *learnt]) for call in (loss, compiled)]
    for eager, traced in zip(*grads, strict=True):
        assert torch.equal(eager, traced)


def test_the_form_follows_programs_depth_and_warm_up():
    assert choose_form(8, 1024, 768, 132) == ("parallel", 128)
    assert choose_form(64, 1024, 768, 132).name == "sequential"  # enough programs without chunks
    assert choose_form(8, 64, 768, 132).name == "sequential"  # not worth two more launches
    assert choose_form(8, 1024, 768, 132, tau=60.0).name == "sequential"  # a warm-up as long as the sequence
    assert choose_form(1, 65536, 512, 108).chunk < 65536 / 16
    assert choose_form(8, 64, 768, 132, form="parallel").name == "parallel"
    assert choose_form(8, 1024, 768, 132, form="sequential") == ("sequential", 0)
    assert [warm_up(tau) for tau in (1.0, 2.0, 3.7, 20.0, None)] == [32, 64, 128, 672, 96]


def test_bad_input_is_refused_in_one_line():
    x, v, _ = make_inputs(1, 4, 3)
    with pytest.raises(UserError, match="form 'chunked' of lif: unknown"):
        lif_triton(x, v, None, *PLAIN, form="chunked")
    with pytest.raises(UserError, match="must be a multiple of 32"):
        lif_triton(x, v, None, *PLAIN, form="parallel", chunk=48)


@contextlib.contextmanager
def planted(module, old, new):
    """`lif_triton` with an error in one of its modules."""
    first = MODULES.index(f"spikescale.kernels.lif.{module}")
    with mutated(MODULES[first], old, new, MODULES[first + 1 :]) as mutant:
        mutant.warm_up = lambda tau: 32
        yield mutant.lif_triton


SEQUENTIAL_ERRORS = {
    "gradient without its way through the membrane": (
        "grad_h = grads[i] * surrogate + grad * through",
        "grad_h = grads[i] * surrogate + grad * 0.5",
    ),
    "gradient of tau one token late": ("grad_current * charges[i]", "grad_current * charges[max(i - 1, 0)]"),
    "a reset one token late in backward": (
        "before = tl.where(bit(resets, i), 0.0, before)",
        "before = tl.where(bit(resets, i) & (i > 0), 0.0, before)",
    ),
    "a last word that belongs to another block": (
        "word = tl.load(bits + place",
        "word = tl.load(bits + 0 * place",
    ),
    "tokens past the end in the gradient": (
        "grad = tl.where(inside, before, grad)",
        "grad = tl.where(lane, before, grad) * 0.999",
    ),
    "tokens past the end in the state": (
        "last = tl.where(inside, membrane, last)",
        "last = tl.where(lane, membrane, last)",
    ),
}


def inputs_for_planted_errors():
    """One row with resets at the edges of a block, one without."""
    x, v, reset = make_inputs(2, 40, 5)
    reset[:] = False
    reset[1, [8, 32, 34]] = True
    return x, v, reset


def test_without_a_planted_error_the_comparison_passes():
    x, v, reset = inputs_for_planted_errors()
    assert_equals_reference(x[1:], v[1:], reset[1:], NEURONS["hard-learnt"], **FORMS[0])
    assert_equals_reference(x, v, reset, NEURONS["soft-learnt"], **FORMS[1])


@pytest.mark.parametrize("error", SEQUENTIAL_ERRORS)
def test_a_planted_error_in_the_gradient_or_a_boundary_fails_the_comparison(error):
    x, v, reset = (tensor[1:] for tensor in inputs_for_planted_errors())
    with planted("triton_sequential", *SEQUENTIAL_ERRORS[error]) as function, pytest.raises(AssertionError):
        assert_equals_reference(x, v, reset, NEURONS["hard-learnt"], function, **FORMS[0])


def test_a_planted_error_in_the_boundary_mask_is_a_memory_violation():
    x, v, reset = make_inputs(1, 40, 5)
    old = "mask = tl.where(left > i, lane, False)"
    with (
        planted("triton_sequential", old, old.replace(">", ">=")) as function,
        checked_memory(seed=0),
        pytest.raises(MemoryViolation, match=r"forward_kernel: .* loads outside"),
    ):
        assert_equals_reference(x, v, reset, PLAIN, function, form="sequential")


FIX_UP_ERRORS = {
    "skipped": ("differ(before, begun[i])", "differ(before, before)"),
    "one chunk early": ("while chunk < chunks:", "while chunk < chunks - 1:"),
    "merged after one block": ("if apart == 0:", "if apart >= 0:"),
}


@pytest.mark.parametrize("error", FIX_UP_ERRORS)
def test_a_planted_error_in_the_fix_up_changes_the_spikes(error):
    with planted("triton_parallel", *FIX_UP_ERRORS[error]) as function, torch.no_grad():
        same = []
        x, v = drives(130, 33)[1:2], torch.linspace(-0.5, 0.9, 33)[None]
        for chunk in (32, 64):
            wanted, v_wanted = lif_reference(x, v, None, *PLAIN)
            spikes, v_out = function(x, v, None, *PLAIN, form="parallel", chunk=chunk)
            same.append(torch.equal(spikes, wanted) and torch.equal(v_out, v_wanted))
    assert not all(same)


PARALLEL_ERRORS = {
    "factor": ("new_factor = factor * through", "new_factor = factor * 0.5"),
    "term": ("new_term -= new_term * inverse_tau", "new_term -= new_term * (1 - inverse_tau)"),
    "reset of the factor": (
        "new_factor = tl.where(bit(resets, i), 0.0, new_factor)",
        "new_factor = tl.where(bit(resets, i), new_factor, new_factor)",
    ),
    "order of the chunks": ("last = chunks - 1 - group * AHEAD", "last = chunks - 2 - group * AHEAD"),
}


@pytest.mark.parametrize("error", PARALLEL_ERRORS)
def test_a_planted_error_in_the_gradient_between_chunks_fails_the_comparison(error):
    with planted("triton_parallel", *PARALLEL_ERRORS[error]) as function, pytest.raises(AssertionError):
        assert_equals_reference(*inputs_for_planted_errors(), NEURONS["soft-learnt"], function, **FORMS[1])


COMPILES = r"""
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spikescale.kernels.lif.triton_sequential import forward_kernel as kernel

constants = {"reset": None, "tau": None, "v_threshold": None, "starts": None, "bits": None, "stride_c": 1,
             "V_RESET": 0.0, "SOFT_RESET": False, "WHOLE": True, "BLOCK_C": 64}
types = {"x": "*fp32", "v": "*fp32", "spikes": "*fp32", "v_out": "*fp32", "tau_value": "fp32",
         "threshold_value": "fp32"}
for inverse in (False, True):
    names = {**constants, "INVERSE_TAU": inverse}
    signature = {name: "constexpr" if name in names else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=names)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    print(*(len(re.findall(operation, ptx)) for operation in (r"div\.rn\.f32", r"div\.\S*f32", "fma")))
"""


def test_compiled_code_divides_as_ieee_754_says_and_contracts_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    by_tau, by_inverse = ([int(word) for word in line.split()] for line in run.stdout.splitlines())
    # 32 tokens are unrolled, of a channel or more a lane.
    assert by_tau[0] >= 32
    assert by_tau[0] % 32 == 0
    assert by_tau[1] == by_tau[0]
    assert by_tau[2] == 0
    assert by_inverse[1:3] == [0, 0]
