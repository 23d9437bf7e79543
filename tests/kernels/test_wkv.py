"""WKV: the reference against sums written out in the test, the C++ kernel against both."""

import functools

import pytest
import torch
from torch import Tensor
from wkv_cases import add_levels, evaluate, make_inputs, make_reset, relative_errors, written_out

from spikescale.kernels.build import INSTRUCTION_SETS, instruction_sets
from spikescale.kernels.wkv import cpu as wkv_cpu
from spikescale.kernels.wkv import initial_state, wkv

reference = functools.partial(wkv, backend="reference")
cpu = functools.partial(wkv, backend="cpu")

CPU_BACKENDS = [
    pytest.param(
        f"cpu-{name}",
        marks=pytest.mark.skipif(name not in instruction_sets(), reason=f"this processor has no {name}"),
    )
    for name in INSTRUCTION_SETS
]
on_every_instruction_set = pytest.mark.parametrize("backend", CPU_BACKENDS)
on_every_backend = pytest.mark.parametrize("backend", ["reference", *CPU_BACKENDS])


def errors_of(
    backend: str, inputs: dict[str, Tensor], reset: Tensor | None, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Relative errors of a backend's outputs and gradients against the float64 reference."""
    actual = evaluate(functools.partial(wkv, backend=backend), inputs, reset, dtype)
    return relative_errors(actual, evaluate(reference, inputs, reset, torch.float64))


def assert_same_sums(actual: Tensor, expected: Tensor) -> None:
    """Two states are equal; the exponent that each is written with is its own affair."""
    scale = torch.exp(actual[:, 2:].double() - expected[:, 2:].double())
    torch.testing.assert_close(actual[:, :2] * scale, expected[:, :2].double(), rtol=1e-5, atol=1e-5)


def with_threads(count: int, inputs: dict[str, Tensor], reset: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of the kernel on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return evaluate(cpu, inputs, reset, torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_state_and_gate", [False, True])
@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 1, 1), (2, 1, 33), (2, 63, 33), (1, 130, 5)])
@pytest.mark.parametrize(("spread", "offset"), [(1, 0), (80, 0), (3, 60)])
def test_reference_equals_the_written_out_sums(
    batch, length, channels, spread, offset, with_state_and_gate, with_reset
):
    inputs = make_inputs(batch, length, channels, spread, offset, with_state_and_gate, with_state_and_gate)
    reset = make_reset(batch, length) if with_reset else None
    actual = evaluate(reference, inputs, reset, torch.float64)
    errors = relative_errors(actual, evaluate(written_out, inputs, reset, torch.float64))
    assert max(errors.values()) <= 1e-9, errors


@on_every_instruction_set
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("channels", [33, 100])
@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize(("spread", "offset"), [(1, 0), (80, 0), (5, 60), (1, -60)])
def test_cpu_forward_and_every_gradient_equal_the_float64_reference(
    length, channels, spread, offset, with_state, with_reset, backend
):
    inputs = make_inputs(1, length, channels, spread, offset, with_state, with_gate=spread != 5)
    reset = make_reset(1, length) if with_reset else None
    errors = errors_of(backend, inputs, reset)
    assert max(errors.values()) <= 1e-5, errors


@on_every_instruction_set
@pytest.mark.parametrize(
    ("batch", "channels", "spread", "offset"),
    [
        (1, 1, 1, 0),
        (1, 33, 80, 0),
        (1, 33, 5, 60),
        (2, 100, 12, 0),
        (2, 100, 80, 0),
    ],
)
def test_cpu_stays_exact_over_a_thousand_tokens(batch, channels, spread, offset, backend):
    inputs = make_inputs(batch, 1000, channels, spread, offset, with_gate=batch == 2)
    reset = make_reset(batch, 1000, 0.01) if batch == 2 else None
    errors = errors_of(backend, inputs, reset)
    assert max(errors.values()) <= 1e-5, errors


# Each case lies on one side of a limit in wkv_state.h, or crosses it within the sequence.
LEVELS = {
    "keys just within reach of the scale": ([0.0, 19.0], 3),
    "keys just beyond it": ([0.0, 21.0], 3),
    "a spike in a quiet sequence": ([0.0] * 37 + [80.0] + [0.0] * 20, 1),
    "stretches that follow one far above": ([0.0, 28.0, 0.0], 16),
    "a past that fades until the scale sinks": ([35.0, 0.0, 0.0, 0.0], 16),
    "a past that outweighs everything": ([80.0, -80.0, -80.0, 0.0], 16),
    "stretches far below the next": ([-100.0, -40.0, 0.0, 80.0], 16),
    "steps away from the chunk boundaries": ([0.0, 55.0, -70.0, -20.0, 75.0], 11),
}


@on_every_instruction_set
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("with_reset", [False, True])
def test_scales_that_rest_and_that_move_mix_within_a_sequence(levels, with_reset, backend):
    added, length = LEVELS[levels]
    inputs = add_levels(make_inputs(2, 130, 35, with_gate=True), added, length)
    reset = make_reset(2, 130, 0.03) if with_reset else None
    errors = errors_of(backend, inputs, reset)
    assert max(errors.values()) <= 1e-5, errors


@on_every_instruction_set
@pytest.mark.parametrize("bonus", [19.9, -19.9, 20.1, -20.1, 100.0, -100.0])
def test_large_bonuses_are_exact(bonus, backend):
    inputs = make_inputs(1, 70, 20)
    inputs["u"] = torch.where(torch.arange(20) % 3 == 0, torch.tensor(bonus), inputs["u"])
    errors = errors_of(backend, inputs, None)
    assert max(errors.values()) <= 1e-5, errors


@on_every_instruction_set
def test_positive_w_and_no_decay_are_exact(backend):
    inputs = make_inputs(1, 70, 20)
    inputs["w"] = torch.linspace(-0.5, 9, 20)
    inputs["w"][7] = 0
    errors = errors_of(backend, inputs, None)
    assert max(errors.values()) <= 1e-5, errors


@on_every_instruction_set
def test_rounding_of_the_decay_does_not_grow_with_the_memory(backend):
    # e^w is rounded by up to 6e-8: over a memory of e^8 = 3000 tokens, uncorrected, by up to 1e-4.
    inputs = make_inputs(1, 4096, 8, spread=2, offset=60)
    inputs["w"] = -torch.exp(torch.linspace(-8, -5, 8))
    errors = errors_of(backend, inputs, None)
    # Without fused products every token rounds twice.
    assert max(errors.values()) <= (3e-5 if backend == "cpu-plain" else 1e-5), errors


@on_every_instruction_set
def test_fast_decays_on_both_sides_of_the_limit_are_exact(backend):
    inputs = add_levels(make_inputs(1, 130, 20, with_gate=True), [60.0, 0.0, -60.0, 30.0], 9)
    inputs["w"] = -torch.linspace(15, 90, 20)
    errors = errors_of(backend, inputs, None)
    assert max(errors.values()) <= 1e-5, errors
    inputs["w"] = inputs["w"].clamp(min=-25)
    errors = errors_of(backend, inputs, None)
    assert max(errors.values()) <= 1e-5, errors


@on_every_instruction_set
@pytest.mark.parametrize("at", [5, 16, 37, 64])
def test_later_tokens_and_other_channels_change_no_bit(at, backend):
    inputs = make_inputs(2, 70, 35, spread=6, with_gate=True)
    y, _ = wkv(**inputs, backend=backend)
    for level in (0.5, 30.0, -90.0):
        later = {**inputs, "k": inputs["k"].clone(), "v": inputs["v"].clone()}
        later["k"][:, at:] += level
        later["v"][:, at:] *= 3
        assert torch.equal(wkv(**later, backend=backend)[0][:, :at], y[:, :at])
        beside = {**inputs, "k": inputs["k"].clone()}
        beside["k"][:, :, at % 35] += level
        others = torch.arange(35) != at % 35
        assert torch.equal(wkv(**beside, backend=backend)[0][:, :, others], y[:, :, others])


@on_every_instruction_set
@pytest.mark.parametrize(("name", "value"), [("u", 21.0), ("w", -26.0)])
def test_parameters_beyond_the_limits_reach_the_last_bits_of_their_register_alone(name, value, backend):
    inputs = make_inputs(2, 70, 48, spread=6, with_gate=True)
    inputs["w"], inputs["u"] = inputs["w"].clamp(min=-20), inputs["u"].clamp(-3, 3)
    y, _ = wkv(**inputs, backend=backend)
    beside = {**inputs, name: inputs[name].clone()}
    beside[name][17] = value
    changed, _ = wkv(**beside, backend=backend)
    channels = torch.arange(48)
    near = (channels >= 16) & (channels < 32)  # or fewer, where registers are narrower
    assert torch.equal(changed[:, :, ~near], y[:, :, ~near])
    neighbours = near & (channels != 17)
    torch.testing.assert_close(changed[:, :, neighbours], y[:, :, neighbours], rtol=1e-5, atol=2e-6)
    errors = errors_of(backend, beside, None)
    assert max(errors.values()) <= 1e-5, errors


def test_reference_computes_in_float64_and_returns_float32():
    errors = errors_of("reference", make_inputs(1, 300, 16, 1, 60, with_gate=True), None)
    assert max(errors.values()) <= 1e-6, errors


def test_gradcheck_of_the_reference():
    inputs = make_inputs(2, 5, 3, with_gate=True)
    leaves = [inputs[name].double().requires_grad_() for name in ("w", "u", "k", "v", "gate")]
    sums = inputs["state"][:, :2].double().requires_grad_()
    m = inputs["state"][:, 2:].double()
    reset = torch.tensor([[False, False, True, False, False], [False] * 5])

    def function(w, u, k, v, gate, sums):
        y, state = reference(w, u, k, v, torch.cat([sums, m], dim=1), reset, gate)
        # a and b alone move with m, which carries no gradient; a e^m and b e^m do not.
        return y, state[:, :2] * torch.exp(state[:, 2:].detach())

    assert torch.autograd.gradcheck(function, (*leaves, sums))


@on_every_backend
def test_gate_multiplies_by_its_sigmoid(backend):
    inputs = make_inputs(1, 40, 33, with_gate=True)
    gate = inputs.pop("gate")
    gate[0, :, :5] = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0])
    y, state = wkv(**inputs, backend=backend)
    gated, gated_state = wkv(**inputs, gate=gate, backend=backend)
    torch.testing.assert_close(gated, y * torch.sigmoid(gate), rtol=5e-7, atol=1e-30)
    assert torch.equal(gated[..., 4], y[..., 4])
    assert torch.equal(state, gated_state)


@on_every_instruction_set
def test_gradient_of_a_saturated_gate_keeps_its_relative_accuracy(backend):
    inputs = make_inputs(1, 40, 3, with_gate=True)
    inputs["gate"][..., :] = torch.tensor([-25.0, 0.0, 25.0])
    actual = evaluate(functools.partial(wkv, backend=backend), inputs, None, torch.float32)["d gate"]
    expected = evaluate(reference, inputs, None, torch.float64)["d gate"]
    for channel in range(3):
        error = (actual[..., channel] - expected[..., channel]).norm() / expected[..., channel].norm()
        assert error <= 1e-5, (channel, float(error))


@on_every_backend
def test_output_does_not_depend_on_the_scale_the_state_is_written_in(backend):
    inputs = make_inputs(2, 7, 33)
    other = inputs["state"].clone()
    other[:, 2] += 8.0
    other[:, :2] *= torch.exp(torch.tensor(-8.0))
    y, _ = wkv(**inputs, backend=backend)
    y_other, _ = wkv(**{**inputs, "state": other}, backend=backend)
    torch.testing.assert_close(y, y_other, rtol=1e-5, atol=1e-6)


@on_every_backend
def test_chunks_with_carried_state_equal_the_whole(backend):
    inputs = make_inputs(2, 50, 33, spread=5)
    y, state = wkv(**inputs, backend=backend)
    w, u, k, v, carried = inputs.values()
    pieces = []
    for start, end in ((0, 1), (1, 17), (17, 33), (33, 50)):
        piece, carried = wkv(w, u, k[:, start:end], v[:, start:end], carried, backend=backend)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), y, rtol=1e-6, atol=1e-6)
    assert_same_sums(carried, state)


@on_every_backend
def test_reset_equals_separate_documents(backend):
    inputs = make_inputs(1, 40, 33, spread=10)
    w, u, k, v, state = inputs.values()
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 13] = True
    y, end = wkv(w, u, k, v, state, reset, backend=backend)
    first, _ = wkv(w, u, k[:, :13], v[:, :13], state, backend=backend)
    second, end_second = wkv(w, u, k[:, 13:], v[:, 13:], backend=backend)
    torch.testing.assert_close(y, torch.cat([first, second], dim=1), rtol=1e-6, atol=1e-6)
    assert_same_sums(end, end_second)


@on_every_instruction_set
def test_gradients_through_chunks_equal_those_of_the_whole(backend):
    inputs = make_inputs(1, 40, 33, spread=3)

    def in_two(w, u, k, v, state, *_):
        first, state = wkv(w, u, k[:, :19], v[:, :19], state, backend=backend)
        second, state = wkv(w, u, k[:, 19:], v[:, 19:], state, backend=backend)
        return torch.cat([first, second], dim=1), state

    actual = evaluate(in_two, inputs, None, torch.float32)
    errors = relative_errors(actual, evaluate(reference, inputs, None, torch.float64))
    assert max(errors.values()) <= 1e-5, errors


@on_every_backend
def test_future_tokens_change_nothing(backend):
    inputs = make_inputs(1, 40, 33)
    y, _ = wkv(**inputs, backend=backend)
    for name, step in (("k", 3), ("k", 300), ("v", 3)):
        changed = inputs[name].clone()
        changed[:, 27:] += step
        y_changed, _ = wkv(**{**inputs, name: changed}, backend=backend)
        assert torch.equal(y_changed[:, :27], y[:, :27])
        assert not torch.allclose(y_changed[:, 27], y[:, 27], atol=1e-2)


def test_non_contiguous_inputs_give_the_same():
    inputs = make_inputs(2, 40, 66, with_gate=True)
    strided = {name: x[..., ::2] for name, x in inputs.items()}
    strided["k"] = strided["k"].transpose(0, 1).contiguous().transpose(0, 1)
    packed = {name: x.contiguous() for name, x in strided.items()}
    assert not strided["k"].is_contiguous()
    results = [evaluate(cpu, x, None, torch.float32) for x in (strided, packed)]
    for name, expected in results[1].items():
        assert torch.equal(results[0][name], expected), name
    y, _ = cpu(**strided)
    assert torch.equal(y, cpu(**packed)[0])


@on_every_backend
@pytest.mark.parametrize("with_gate", [False, True])
def test_bfloat16_differs_from_float32_by_the_rounding_of_y_only(with_gate, backend):
    inputs = make_inputs(2, 70, 100, with_gate=with_gate)
    low = {name: x.bfloat16() if name in ("k", "v", "gate") else x for name, x in inputs.items()}
    high = {name: x.float() for name, x in low.items()}
    y, state = wkv(**low, backend=backend)
    y_float, state_float = wkv(**high, backend=backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y_float.bfloat16())
    assert state.dtype == torch.float32
    assert torch.equal(state, state_float)


@on_every_instruction_set
@pytest.mark.parametrize("spread", [2, 20])
def test_bfloat16_gradients_are_the_float32_ones_rounded(spread, backend):
    inputs = make_inputs(2, 70, 100, spread=spread, with_gate=True)
    grad = torch.randn(2, 70, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    grads = {}
    for dtype in (torch.bfloat16, torch.float32):
        low = {
            name: x.bfloat16().to(dtype) if name in ("k", "v", "gate") else x for name, x in inputs.items()
        }
        leaves = {name: x.detach().clone().requires_grad_() for name, x in low.items()}
        y, _ = wkv(**leaves, backend=backend)
        y.backward(grad.to(dtype))
        grads[dtype] = {name: leaf.grad for name, leaf in leaves.items()}
    for name, low_grad in grads[torch.bfloat16].items():
        assert torch.equal(low_grad, grads[torch.float32][name].to(low_grad.dtype)), name


@on_every_backend
@pytest.mark.parametrize("length", [10, 50])
def test_nan_and_infinity_are_not_hidden(length, backend):
    inputs = make_inputs(1, length, 33, with_state=False, with_gate=length == 50)
    other = torch.arange(33) != 7
    for name, bad in (("k", torch.nan), ("v", torch.nan), ("k", torch.inf)):
        broken = inputs[name].clone()
        broken[0, 4, 7] = bad
        y, state = wkv(**{**inputs, name: broken}, backend=backend)
        assert y[0, 4:, 7].isnan().all(), (name, bad)
        assert state[0, 0, 7].isnan()
        assert y[0, :4, 7].isfinite().all()
        assert y[0, :, other].isfinite().all()
    infinite = inputs["v"].clone()
    infinite[0, 4, 7] = torch.inf
    assert not wkv(**{**inputs, "v": infinite}, backend=backend)[0][0, 4:, 7].isfinite().any()
    ignored = inputs["k"].clone()
    ignored[0, 4, 7] = -torch.inf
    y, _ = wkv(**{**inputs, "k": ignored}, backend=backend)
    assert y.isfinite().all()
    y, _ = wkv(**{**inputs, "gate": torch.full_like(ignored, torch.nan)}, backend=backend)
    assert y.isnan().all()


@on_every_instruction_set
def test_a_nan_reaches_the_gradients_of_its_channel_only(backend):
    inputs = make_inputs(1, 50, 33, with_gate=True)
    # The gradient of v does not depend on v.
    for name, reached in (("k", "kv"), ("v", "k"), ("gate", "kv")):
        broken = {**inputs, name: inputs[name].clone()}
        broken[name][0, 20, 7] = torch.nan
        grads = evaluate(functools.partial(wkv, backend=backend), broken, None, torch.float32)
        assert grads["d gate"][0, 20, 7].isnan(), name
        for gradient in ("d k", "d v"):
            assert bool(grads[gradient][0, 20, 7].isnan()) == (gradient[-1] in reached), (name, gradient)
            assert grads[gradient][..., torch.arange(33) != 7].isfinite().all(), (name, gradient)


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = make_inputs(3, 100, 200, with_gate=True)
    one, three = with_threads(1, inputs), with_threads(3, inputs)
    for name, expected in one.items():
        assert torch.equal(three[name], expected), name


@pytest.mark.parametrize("reset_share", [0.0, 0.0005, 0.01])
@pytest.mark.parametrize(("channels", "threads"), [(33, 4), (33, 8), (5, 4), (5, 2)])
@pytest.mark.parametrize("levels", [[0.0], [0.0, 70.0, -70.0, 0.0, 0.0]])
def test_cutting_a_long_sequence_in_time_changes_the_rounding_only(channels, threads, reset_share, levels):
    inputs = add_levels(make_inputs(1, 5000, channels, spread=3, with_gate=True), levels, 97)
    inputs["w"] = -torch.exp(torch.linspace(-9, 1, channels))
    reset = make_reset(1, 5000, reset_share) if reset_share else None
    whole, cut, again = (with_threads(count, inputs, reset) for count in (1, threads, threads))
    for name in whole:
        assert torch.equal(cut[name], again[name]), name
    errors = relative_errors(cut, whole)
    # The sum over all tokens that is the gradient of w cancels to a small part of its terms.
    assert errors.pop("d w") <= 1e-5
    assert max(errors.values()) <= 1e-6, errors
    if threads // -(-channels // 16) > 1 and reset is None:
        assert not torch.equal(cut["y"], whole["y"])


def test_a_long_sequence_cut_in_time_equals_the_reference():
    inputs = add_levels(make_inputs(1, 2000, 16, spread=3, with_gate=True), [0.0, 70.0, -70.0, 0.0], 97)
    inputs["w"] = -torch.exp(torch.linspace(-9, 1, 16))
    reset = make_reset(1, 2000, 0.001)
    expected = evaluate(reference, inputs, reset, torch.float64)
    errors = relative_errors(with_threads(4, inputs, reset), expected)
    assert max(errors.values()) <= 1e-5, errors


def test_marks_for_backward_take_a_quarter_of_a_float_an_element():
    inputs = make_inputs(2, 64, 48, with_gate=True)
    w, u, k, v, state, gate = inputs.values()
    _, _, marks = wkv_cpu.wkv_forward(w, u, k, v, state, None, gate, True, "cpu-plain")
    assert marks.numel() * 4 == k.numel()
    _, _, marks = wkv_cpu.wkv_forward(w, u, k, v, state, None, gate, False, "cpu-plain")
    assert marks.numel() == 0


@pytest.mark.parametrize("with_gate", [False, True])
def test_torch_accepts_the_operator_registration(with_gate):
    inputs = make_inputs(2, 20, 5, with_gate=with_gate)
    w, u, k, v, state = (inputs[name].requires_grad_() for name in ("w", "u", "k", "v", "state"))
    gate = inputs["gate"].requires_grad_() if with_gate else None
    torch.library.opcheck(
        wkv_cpu.wkv_forward, (w, u, k, v, state, make_reset(2, 20), gate, True, "cpu-plain")
    )
    with torch.no_grad():
        torch.library.opcheck(wkv_cpu.wkv_forward, (w, u, k, v, state, None, gate, False, "cpu-plain"))


def test_wrong_shapes_are_refused():
    inputs = make_inputs(1, 4, 3)
    with pytest.raises(ValueError, match="w and u must be"):
        wkv(**{**inputs, "w": inputs["w"][:2]})
    with pytest.raises(ValueError, match="state must be"):
        wkv(**{**inputs, "state": inputs["state"][:, :2]})
    with pytest.raises(ValueError, match="reset must be"):
        wkv(**inputs, reset=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="gate must be"):
        wkv(**inputs, gate=torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="time >= 1"):
        wkv(**{**inputs, "k": inputs["k"][:, :0], "v": inputs["v"][:, :0]})


def test_initial_state_is_empty():
    state = initial_state(2, 3)
    assert state.shape == (2, 3, 3)
    assert (state[:, :2] == 0).all()
    assert (state[:, 2] == -1e38).all()
