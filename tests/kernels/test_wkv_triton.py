"""WKV's Triton kernels, interpreted, against the float64 reference; and the choice between their forms."""

import functools
import inspect
import os

import numpy as np
import pytest
import torch
from triton_harness import MemoryViolation, bf16_rounding, checked_memory, mutated
from wkv_cases import make_inputs, make_reset, relative_errors

from spikescale.kernels.wkv import initial_state, wkv
from spikescale.kernels.wkv.triton_plan import CHUNKS, Form, bytes_per_element, choose_form, modelled_time

# Lanes without a channel and tokens past the end compute with infinities that are never stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: run pytest without -m gpu"
)
PACKAGE = "spikescale.kernels.wkv"
# (largest |k - offset|, offset) of a quarter of the channels each, so that one run covers all.
MIXTURE = ((1.0, 0.0), (80.0, 0.0), (5.0, 60.0), (1.0, -60.0))
reference = functools.partial(wkv, backend="reference")


@pytest.fixture(autouse=True)
def few_wide_programs(monkeypatch):
    """Interpreting costs by the operation, not by its width: blocks of 128 channels.

    Half of that cost is Triton patching its language again at every call of a device function: once a launch
    is enough.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    from spikescale.kernels.wkv import triton

    monkeypatch.setattr(triton, "FORWARD_WARPS", 4)
    monkeypatch.setattr(triton, "WARPS", 4)
    patch, execute, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        key = tuple(sorted({module.__name__ for module in modules if module in (tl, tl.core)}))
        if key in done:
            return None
        done.add(key)
        return patch(function)

    def execute_patched(*args, **kwargs):
        done.clear()
        return execute(*args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", execute_patched)


def make_case(batch, length, channels, full, mixture=MIXTURE):
    """(inputs by name, reset): with `full` a state, a gate and resets."""
    widths = [len(part) for part in torch.arange(channels).tensor_split(len(mixture))]
    parts = [
        make_inputs(batch, length, width, spread, offset, full)
        for width, (spread, offset) in zip(widths, mixture, strict=True)
        if width
    ]
    inputs = {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}
    if full:
        gate = torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(3)) * 3
        return {**inputs, "gate": gate}, make_reset(batch, length)
    return inputs, None


def evaluate(function, inputs, reset, dtype, compute=None, only_state=False):
    """Outputs and gradients by name, of a fixed random combination of y and the final sums."""
    leaves = {
        name: x.detach().to(dtype if name in ("k", "v", "gate") else compute or dtype).requires_grad_()
        for name, x in inputs.items()
    }
    w, u, k, v, state, *gate = leaves.values()
    y, state = function(w, u, k, v, state, reset, gate[0] if gate else None)
    generator = torch.Generator().manual_seed(9)
    # Weights that bfloat16 holds.
    weights = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)
    weights_state = torch.randn(state[:, :2].shape, generator=generator)
    # The final sums on a scale that does not depend on how the state is written.
    common = inputs["k"].double()[:, -1:].round()
    sums = (state[:, :2].double() * torch.exp(state[:, 2:].detach().double() - common)).clamp(-1e30, 1e30)
    loss = (sums * weights_state / (1 + sums.detach().abs())).sum()
    if not only_state:
        loss = loss + (y * weights).sum().double()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    names = ("y", "sums", *(f"d{name}" for name in leaves))
    return dict(zip(names, (y.detach(), sums.detach(), *grads), strict=True))


def errors_of(function, inputs, reset, mixture=MIXTURE, **options):
    """Largest relative error of any channel group, by name, in float32."""
    actual = evaluate(function, inputs, reset, torch.float32, **options)
    expected = evaluate(reference, inputs, reset, torch.float64, **options)
    errors = dict.fromkeys(actual, 0.0)
    for part in torch.arange(inputs["w"].numel()).tensor_split(len(mixture)):
        if len(part):
            pair = ({name: x[..., part] for name, x in values.items()} for values in (actual, expected))
            errors = {name: max(errors[name], error) for name, error in relative_errors(*pair).items()}
    return errors


def triton_form(form, chunk=None, module=None):
    from spikescale.kernels.wkv import triton

    return functools.partial((module or triton).wkv_triton, form=form, chunk=chunk)


FORMS = [("sequential", None), ("chunked", 32)]


@interpreted
@pytest.mark.parametrize(("form", "chunk"), FORMS)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "full"),
    [(2, 1, 1, True), (1, 1, 100, False), (2, 63, 33, True), (1, 63, 1, False), (1, 63, 100, False)],
)
def test_forward_and_every_gradient_equal_the_float64_reference(form, chunk, batch, length, channels, full):
    errors = errors_of(triton_form(form, chunk), *make_case(batch, length, channels, full))
    assert max(errors.values()) <= 1e-5, errors


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("form", "chunk"), FORMS)
def test_long_sequences_stay_exact(form, chunk):
    errors = errors_of(triton_form(form, chunk), *make_case(1, 200, 100, True))
    assert max(errors.values()) <= 1e-5, errors


@interpreted
def test_constant_offset_of_the_keys_costs_no_accuracy_across_many_chunks():
    # 12 chunks, and a carry that loads them four by four.
    mixture = ((3.0, 60.0), (3.0, -60.0))
    inputs, _ = make_case(1, 93, 34, False, mixture)
    errors = errors_of(triton_form("chunked", 8), inputs, None, mixture)
    assert max(errors.values()) <= 1e-5, errors


@interpreted
@pytest.mark.parametrize(("form", "chunk"), [("sequential", None), ("chunked", 16)])
def test_inexact_functions_of_a_gpu_leave_enough_accuracy(form, chunk, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    generator = np.random.default_rng(0)

    def inexact(original):
        def compute(builder, x):
            exact = original(builder, x)
            error = 1 + generator.uniform(-(2.0**-22), 2.0**-22, exact.data.shape)
            return TensorHandle((exact.data * error).astype(exact.data.dtype), exact.dtype)

        return compute

    for name in ("create_exp2", "create_rsqrt"):
        monkeypatch.setattr(InterpreterBuilder, name, inexact(getattr(InterpreterBuilder, name)))
    errors = errors_of(triton_form(form, chunk), *make_case(1, 40, 100, True))
    assert max(errors.values()) <= 1e-5, errors
    assert errors["y"] >= 5e-8, errors  # it was inexact


@interpreted
def test_chunked_equals_sequential():
    inputs, reset = make_case(2, 37, 20, True)
    sequential = evaluate(triton_form("sequential"), inputs, reset, torch.float32)
    chunked = evaluate(triton_form("chunked", 16), inputs, reset, torch.float32)
    errors = relative_errors(chunked, sequential)
    assert max(errors.values()) <= 3e-6, errors


@interpreted
@pytest.mark.parametrize(("form", "chunk"), [("sequential", None), ("chunked", 8)])
def test_gradients_come_from_the_final_state_alone_too(form, chunk):
    inputs, _ = make_case(1, 13, 8, True)
    function = triton_form(form, chunk)
    errors = errors_of(function, inputs, None, only_state=True)
    assert max(errors.values()) <= 1e-5, errors


@interpreted
@pytest.mark.parametrize(("form", "chunk"), [("sequential", None), ("chunked", 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_the_float32_results_rounded(form, chunk, dtype):
    inputs, reset = make_case(1, 13, 40, True)
    inputs = {name: x.to(dtype).float() if name in ("k", "v", "gate") else x for name, x in inputs.items()}
    function = triton_form(form, chunk)
    with bf16_rounding():
        narrow = evaluate(function, inputs, reset, dtype, torch.float32)
    wide = evaluate(function, inputs, reset, torch.float32)
    for name, expected in wide.items():
        assert narrow[name].dtype == (dtype if name in ("y", "dk", "dv", "dgate") else expected.dtype), name
        assert torch.equal(narrow[name], expected.to(narrow[name].dtype)), name


@interpreted
@pytest.mark.parametrize(("form", "chunk"), [("sequential", None), ("chunked", 8)])
def test_memory_is_respected_in_any_order_of_the_programs(form, chunk, monkeypatch):
    from spikescale.kernels.wkv import triton

    # Blocks of 32 channels: two programs beside each other, the second one partly empty.
    monkeypatch.setattr(triton, "FORWARD_WARPS", 1)
    monkeypatch.setattr(triton, "WARPS", 1)
    inputs, reset = make_case(2, 21, 37, True)
    with checked_memory(seed=1):
        errors = errors_of(triton_form(form, chunk), inputs, reset)
    assert max(errors.values()) <= 1e-5, errors


# What is planted, by module, and the form that must notice.
MUTATIONS = {
    "gradient of k": (
        "triton_token",
        "tl.fma(apart, future[0], -future[1])",
        "apart * future[0]",
        "sequential",
    ),
    "gradient of w": ("triton_token", "slope - share * mean_age * news", "slope", "sequential"),
    "gradient of w over chunks": ("triton_chunked", "(chunk[5] - mean_age)", "chunk[5]", "chunked"),
    "gradient of the gate": ("triton_token", "grad * opened * shut", "grad * opened", "chunked"),
    "mean moves in a chunk": ("triton_chunked_backward", "d, drift, (high", "d, 0.0, (high", "chunked"),
    "time mask of loads": (
        "triton_token",
        "mask = tl.where(t + i < length, inside, False)\n            loaded",
        "mask = tl.where(t + i < length + 1, inside, False)\n            loaded",
        "sequential",
    ),
    "time mask of stores": (
        "triton_token",
        "out, mask=tl.where(t + i < length, inside, False)",
        "out, mask=inside",
        "chunked",
    ),
    "channel mask": ("triton_token", "inside = channels < C", "inside = channels <= C", "chunked"),
    "reset in forward": (
        "triton_chunked",
        "past = choose(emptied[i], own[i], past)",
        "past = past",
        "chunked",
    ),
    "reset in backward": (
        "triton_token",
        "future = choose(resets[i], empty_future(w), future)",
        "future = future",
        "sequential",
    ),
    "reset in the backward carry": (
        "triton_chunked_backward",
        "before = choose(emptied, (s, d, high, extra, age), before)",
        "before = before",
        "chunked",
    ),
    "carry": ("triton_chunked", "past = older_past(past, length)", "past = past", "chunked"),
    "backward carry": ("triton_chunked_backward", "older_future(future, CHUNK)", "future", "chunked"),
    "padding of the last block": (
        "triton_sequential",
        "older_past(past, T - blocks * SUB)",
        "past",
        "sequential",
    ),
    "padding on the way back": (
        "triton_chunked_backward",
        "older_future(future, CHUNK - blocks * SUB)",
        "future",
        "chunked",
    ),
}


@interpreted
@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_errors_are_found(name):
    module, old, new, form = MUTATIONS[name]
    chain = ("triton_token", "triton_sequential", "triton_chunked", "triton_chunked_backward", "triton")
    importers = [f"{PACKAGE}.{other}" for other in chain[chain.index(module) + 1 :]]
    inputs, _ = make_case(1, 19, 5, True, MIXTURE[:1])
    reset = torch.zeros(1, 19, dtype=torch.bool)
    reset[0, 11] = True
    with mutated(f"{PACKAGE}.{module}", old, new, importers) as mutant, checked_memory(seed=2):
        function = triton_form(form, 8 if form == "chunked" else None, mutant)
        try:
            errors = errors_of(function, inputs, reset, MIXTURE[:1])
        except MemoryViolation:
            return
    assert not max(errors.values()) <= 1e-3, f"{name} went unnoticed: {errors}"


@interpreted
def test_strided_inputs_give_the_same_and_rows_are_not_copied():
    from spikescale.kernels.wkv.triton import _rows

    inputs, reset = make_case(2, 11, 8, True)
    packed = torch.cat([inputs["k"], inputs["v"], inputs["gate"]], dim=-1)
    k, v, gate = packed.split(8, dim=-1)
    sparse = v.repeat_interleave(2, dim=-1)[..., ::2]  # channels apart: copied
    swapped = k.transpose(0, 1).contiguous().transpose(0, 1)
    assert _rows(gate) is gate and _rows(swapped) is swapped and _rows(sparse) is not sparse
    w, u, state = inputs["w"], inputs["u"], inputs["state"]
    for form, chunk in (("sequential", None), ("chunked", 8)):
        function = triton_form(form, chunk)
        expected = function(w, u, k.contiguous(), v.contiguous(), state, reset, gate.contiguous())
        for actual, wanted in zip(function(w, u, swapped, sparse, state, reset, gate), expected, strict=True):
            assert torch.equal(actual, wanted)


@interpreted
@pytest.mark.parametrize(("form", "chunk"), [("sequential", None), ("chunked", 8)])
def test_gradients_with_strided_inputs_are_those_with_contiguous_ones(form, chunk):
    from spikescale.kernels.wkv.triton import _rows

    inputs, reset = make_case(2, 11, 8, True)
    generator = torch.Generator().manual_seed(4)
    # The gradient of y as a slice of a larger one, over tokens that come first in memory.
    grad_y = torch.randn(11, 2, 24, generator=generator).transpose(0, 1)[..., 8:16]
    packed = torch.cat([inputs["gate"], inputs["k"]], dim=-1)
    gate, k = packed.split(8, dim=-1)
    strided = {"k": k, "v": inputs["v"].transpose(0, 1).contiguous().transpose(0, 1), "gate": gate}
    for x in (*strided.values(), grad_y):
        assert not x.is_contiguous() and _rows(x) is x
    strided["v"] = strided["v"].repeat_interleave(2, dim=-1)[..., ::2]  # channels apart: copied
    function, results = triton_form(form, chunk), []
    for tensors, grad in ((strided, grad_y), ({}, grad_y.contiguous())):
        leaves = {name: tensors.get(name, x).detach().requires_grad_() for name, x in inputs.items()}
        w, u, k, v, state, gate = leaves.values()
        y, _ = function(w, u, k, v, state, reset, gate)
        results.append([y, *torch.autograd.grad(y, list(leaves.values()), grad)])
    for actual, wanted in zip(*results, strict=True):
        assert torch.equal(actual, wanted)


@interpreted
def test_gradient_of_a_plain_sum_is_taken_though_it_has_no_strides():
    inputs, _ = make_case(1, 9, 4, False)
    k = inputs["k"].clone().requires_grad_()
    y, _ = triton_form("sequential")(inputs["w"], inputs["u"], k, inputs["v"], inputs["state"])
    (grad,) = torch.autograd.grad(y.sum(), k)
    exact = inputs["k"].double().requires_grad_()
    y, _ = reference(inputs["w"].double(), inputs["u"], exact, inputs["v"].double(), inputs["state"].double())
    (expected,) = torch.autograd.grad(y.sum(), exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)


@interpreted
def test_pieces_with_carried_state_equal_the_whole():
    inputs, _ = make_case(1, 20, 12, True)
    w, u, k, v, state, _ = inputs.values()
    run = functools.partial(wkv, backend="triton")
    whole, end = run(w, u, k, v, state)
    first, carried = triton_form("chunked", 8)(w, u, k[:, :13], v[:, :13], state)
    second, carried = run(w, u, k[:, 13:], v[:, 13:], carried)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(carried, end, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize(("form", "chunk"), [("sequential", None), ("chunked", 8)])
def test_nan_and_infinity_are_not_hidden(form, chunk):
    inputs, _ = make_case(1, 18, 6, False, MIXTURE[:1])
    v = inputs["v"].clone()
    k = inputs["k"].clone()
    k[0, 4, 0], v[0, 4, 1], k[0, 4, 2], v[0, 4, 3], k[0, 4, 4] = (
        torch.nan,
        torch.nan,
        torch.inf,
        torch.inf,
        -torch.inf,
    )
    y, state = triton_form(form, chunk)(inputs["w"], inputs["u"], k, v, inputs["state"])
    assert y[0, 4:, :3].isnan().all() and state[0, 0, :3].isnan().all()
    assert not y[0, 4:, 3].isfinite().any()
    assert y[0, :4].isfinite().all()
    # A key of -inf weighs nothing.
    assert y[0, :, 4:].isfinite().all() and state[0, :, 4:].isfinite().all()


@interpreted
def test_documents_do_not_reach_each_other_even_with_nan():
    inputs, _ = make_case(1, 18, 3, False, MIXTURE[:1])
    reset = torch.zeros(1, 18, dtype=torch.bool)
    reset[0, 10] = True
    v = inputs["v"].clone()
    v[0, 13] = torch.nan
    for form, chunk in (("sequential", None), ("chunked", 8)):
        leaf = v.clone().requires_grad_()
        y, _ = triton_form(form, chunk)(inputs["w"], inputs["u"], inputs["k"], leaf, inputs["state"], reset)
        assert y[0, :13].isfinite().all() and y[0, 13:].isnan().all()
        (grad,) = torch.autograd.grad((y * y).sum(), leaf)
        assert grad[0, :10].isfinite().all() and grad[0, :10].abs().min() > 0


@interpreted
@pytest.mark.parametrize("chunk", [0, 8])
def test_torch_accepts_the_operator_registration(chunk):
    from spikescale.kernels.wkv.triton import wkv_triton_forward

    inputs, reset = make_case(1, 9, 2, True, MIXTURE[:1])
    w, u, k, v, state, gate = (x.requires_grad_() for x in inputs.values())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(wkv_triton_forward, (w, u, k, v, state, reset, gate, chunk, True), test_utils=tests)
    plain = [x.detach() for x in (w, u, k, v, state)]
    torch.library.opcheck(wkv_triton_forward, (*plain, None, None, chunk, False), test_utils=tests)


@interpreted
def test_shapes_of_the_fake_backward_are_the_real_ones():
    from spikescale.kernels.wkv.triton import wkv_triton_backward, wkv_triton_forward

    inputs, reset = make_case(1, 9, 2, True, MIXTURE[:1])
    w, u, k, v, state, gate = inputs.values()
    for chosen in (gate, None):
        y, state_out, saved = wkv_triton_forward(w, u, k, v, state, reset, chosen, 8, True)
        arguments = (w, u, k, v, reset, chosen, saved, state_out, torch.ones_like(y), None, 8)
        torch.library.opcheck(wkv_triton_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@interpreted
def test_unknown_forms_and_wrong_chunks_are_refused():
    inputs, _ = make_case(1, 3, 2, False, MIXTURE[:1])
    for form, chunk, complaint in (
        ("matmul", None, "unknown"),
        ("chunked", 12, "multiple of 8"),
        ("sequential", 8, "multiple of 8"),
    ):
        with pytest.raises(ValueError, match=complaint):
            triton_form(form, chunk)(**inputs)


@interpreted
def test_without_gradients_nothing_is_saved():
    from spikescale.kernels.wkv.triton import wkv_triton_forward

    inputs, _ = make_case(1, 9, 2, False, MIXTURE[:1])
    for chunk, rows in ((0, 2), (8, 2)):
        arguments = (*inputs.values(), None, None, chunk)
        assert wkv_triton_forward(*arguments, False)[2].numel() == 0
        assert wkv_triton_forward(*arguments, True)[2].shape == (1, rows, 6, 2)
    state = initial_state(1, 2)
    y, _ = wkv(inputs["w"], inputs["u"], inputs["k"], inputs["v"], state, backend="triton")
    assert not y.requires_grad


@pytest.mark.parametrize(("element_size", "sequential", "chunked"), [(4, 38.0, 63.25), (2, 22.0, 37.25)])
def test_bytes_moved_are_those_of_the_readme(element_size, sequential, chunked):
    assert bytes_per_element(Form(0), 1024, element_size) == sequential
    assert bytes_per_element(Form(64), 1024, element_size) == chunked
    # fla's fused_recurrent_rwkv4 moves 80 in float32.
    assert bytes_per_element(Form(32), 1024, 4) < 70


@pytest.mark.parametrize("length", [256, 1024, 16384])
@pytest.mark.parametrize("element_size", [2, 4])
def test_the_choice_goes_from_chunked_to_sequential_as_batch_times_channels_grows(length, element_size):
    names = [choose_form(batch, length, 768, element_size).name for batch in (1, 4, 16, 64, 256, 1024)]
    assert names == sorted(names)  # chunked before sequential
    assert (names[0], names[-1]) == ("chunked", "sequential")


def test_a_single_token_is_sequential_and_a_named_form_is_kept():
    assert choose_form(1, 1, 768, gradients=False) == Form(0)
    assert choose_form(512, 1024, 1024, name="chunked").chunk in CHUNKS
    assert choose_form(1, 65536, 64, name="sequential") == Form(0)


def test_the_chosen_form_has_the_least_modelled_time():
    for shape in ((1, 200, 33), (8, 1024, 768), (64, 512, 1024)):
        times = {form: modelled_time(form, *shape) for form in map(Form, (0, *CHUNKS))}
        assert times[choose_form(*shape)] == min(times.values())
