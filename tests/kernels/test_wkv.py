"""WKV: the reference against sums written out in the test, the C++ kernel against both."""

import functools

import pytest
import torch
from wkv_cases import evaluate, make_inputs, make_reset, relative_errors, written_out

from spikescale.kernels.wkv import initial_state, wkv

reference = functools.partial(wkv, backend="reference")
cpu = functools.partial(wkv, backend="cpu")


def as_wkv(function, w, u, k, v, state, reset):
    return function(w, u, k, v, state=state, reset=reset)


def compare(function, dtype, inputs, reset, expected_by=None):
    actual = evaluate(functools.partial(as_wkv, function), inputs, reset, dtype)
    judge = expected_by or functools.partial(as_wkv, reference)
    return relative_errors(actual, evaluate(judge, inputs, reset, torch.float64))


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 1, 1), (2, 1, 33), (2, 63, 33), (1, 130, 5)])
@pytest.mark.parametrize(("spread", "offset"), [(1, 0), (80, 0), (3, 60)])
def test_reference_equals_the_written_out_sums(
    batch, length, channels, spread, offset, with_state, with_reset
):
    inputs = make_inputs(batch, length, channels, spread, offset, with_state)
    reset = make_reset(batch, length) if with_reset else None
    errors = compare(reference, torch.float64, inputs, reset, expected_by=written_out)
    assert max(errors.values()) <= 1e-9, errors


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("channels", [33, 100])
@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize(("spread", "offset"), [(1, 0), (80, 0), (5, 60), (1, -60)])
def test_cpu_forward_and_every_gradient_equal_the_float64_reference(
    length, channels, spread, offset, with_state, with_reset
):
    inputs = make_inputs(1, length, channels, spread, offset, with_state)
    reset = make_reset(1, length) if with_reset else None
    errors = compare(cpu, torch.float32, inputs, reset)
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize(("spread", "offset"), [(1, 0), (80, 0), (5, 60)])
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (1, 33), (2, 100)])
def test_cpu_stays_exact_over_a_thousand_tokens(batch, channels, spread, offset):
    inputs = make_inputs(batch, 1000, channels, spread, offset)
    reset = make_reset(batch, 1000, 0.01) if batch == 2 else None
    errors = compare(cpu, torch.float32, inputs, reset)
    assert max(errors.values()) <= 1e-5, errors


def test_reference_computes_in_float64_and_returns_float32():
    inputs = make_inputs(1, 300, 16, 1, 60)
    errors = compare(reference, torch.float32, inputs, None)
    assert max(errors.values()) <= 1e-6, errors


def test_gradcheck_of_the_reference():
    inputs = make_inputs(2, 5, 3)
    leaves = [inputs[name].double().requires_grad_() for name in ("w", "u", "k", "v")]
    sums = inputs["state"][:, :2].double().requires_grad_()
    m = inputs["state"][:, 2:].double()
    reset = torch.tensor([[False, False, True, False, False], [False] * 5])

    def function(w, u, k, v, sums):
        y, state = reference(w, u, k, v, state=torch.cat([sums, m], dim=1), reset=reset)
        # a and b alone move with m, which carries no gradient; a e^m and b e^m do not.
        return y, state[:, :2] * torch.exp(state[:, 2:].detach())

    assert torch.autograd.gradcheck(function, (*leaves, sums))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_output_does_not_depend_on_the_scale_the_state_is_written_in(backend):
    inputs = make_inputs(2, 7, 33)
    other = inputs["state"].clone()
    other[:, 2] += 8.0
    other[:, :2] *= torch.exp(torch.tensor(-8.0))
    y, _ = wkv(**inputs, backend=backend)
    y_other, _ = wkv(**{**inputs, "state": other}, backend=backend)
    torch.testing.assert_close(y, y_other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_chunks_with_carried_state_equal_the_whole(backend):
    inputs = make_inputs(2, 50, 33, spread=5)
    y, state = wkv(**inputs, backend=backend)
    w, u, k, v, carried = inputs.values()
    pieces = []
    for start, end in ((0, 1), (1, 17), (17, 33), (33, 50)):
        piece, carried = wkv(w, u, k[:, start:end], v[:, start:end], carried, backend=backend)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(carried, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_reset_equals_separate_documents(backend):
    inputs = make_inputs(1, 40, 33, spread=10)
    w, u, k, v, state = inputs.values()
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 13] = True
    y, end = wkv(w, u, k, v, state, reset, backend)
    first, _ = wkv(w, u, k[:, :13], v[:, :13], state, backend=backend)
    second, end_second = wkv(w, u, k[:, 13:], v[:, 13:], backend=backend)
    torch.testing.assert_close(y, torch.cat([first, second], dim=1), rtol=0, atol=0)
    torch.testing.assert_close(end, end_second, rtol=0, atol=0)


def test_gradients_through_chunks_equal_those_of_the_whole():
    inputs = make_inputs(1, 40, 33, spread=3)

    def in_two(w, u, k, v, state, reset):
        first, state = cpu(w, u, k[:, :19], v[:, :19], state)
        second, state = cpu(w, u, k[:, 19:], v[:, 19:], state)
        return torch.cat([first, second], dim=1), state

    actual = evaluate(in_two, inputs, None, torch.float32)
    expected = evaluate(functools.partial(as_wkv, reference), inputs, None, torch.float64)
    errors = relative_errors(actual, expected)
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_future_tokens_change_nothing(backend):
    inputs = make_inputs(1, 20, 33)
    y, _ = wkv(**inputs, backend=backend)
    for name in ("k", "v"):
        changed = inputs[name].clone()
        changed[:, 11:] += 3
        y_changed, _ = wkv(**{**inputs, name: changed}, backend=backend)
        assert torch.equal(y_changed[:, :11], y[:, :11])
        assert not torch.equal(y_changed[:, 11], y[:, 11])


def test_non_contiguous_inputs_give_the_same():
    inputs = make_inputs(2, 40, 66)
    strided = {name: x[..., ::2] for name, x in inputs.items()}
    strided["k"] = strided["k"].transpose(0, 1).contiguous().transpose(0, 1)
    packed = {name: x.contiguous() for name, x in strided.items()}
    assert not strided["k"].is_contiguous()
    results = [evaluate(functools.partial(as_wkv, cpu), x, None, torch.float32) for x in (strided, packed)]
    for name, expected in results[1].items():
        assert torch.equal(results[0][name], expected), name
    y, _ = cpu(**strided)
    assert torch.equal(y, cpu(**packed)[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bfloat16_differs_from_float32_by_the_rounding_of_y_only(backend):
    inputs = make_inputs(2, 70, 100)
    k, v = inputs["k"].bfloat16(), inputs["v"].bfloat16()
    rest = {name: inputs[name] for name in ("w", "u", "state")}
    y, state = wkv(k=k, v=v, **rest, backend=backend)
    y_float, state_float = wkv(k=k.float(), v=v.float(), **rest, backend=backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y_float.bfloat16())
    assert state.dtype == torch.float32
    assert torch.equal(state, state_float)


def test_bfloat16_gradients_are_the_float32_ones_rounded():
    inputs = make_inputs(2, 70, 100, spread=20)
    k, v = inputs["k"].bfloat16(), inputs["v"].bfloat16()
    grad = torch.randn(2, 70, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    grads = {}
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.detach().clone().requires_grad_() for x in (inputs["w"], k.to(dtype), v.to(dtype))]
        y, _ = cpu(leaves[0], inputs["u"], leaves[1], leaves[2])
        y.backward(grad.to(dtype))
        grads[dtype] = [leaf.grad for leaf in leaves]
    assert torch.equal(grads[torch.bfloat16][0], grads[torch.float32][0])
    for low, high in zip(grads[torch.bfloat16][1:], grads[torch.float32][1:], strict=True):
        assert torch.equal(low, high.bfloat16())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_and_infinity_are_not_hidden(backend):
    inputs = make_inputs(1, 10, 33, with_state=False)
    for name, bad in (("k", torch.nan), ("v", torch.nan), ("k", torch.inf)):
        broken = inputs[name].clone()
        broken[0, 4, 7] = bad
        y, state = wkv(**{**inputs, name: broken}, backend=backend)
        assert y[0, 4:, 7].isnan().all(), (name, bad)
        assert state[0, 0, 7].isnan()
        assert y[0, :4, 7].isfinite().all()
        assert y[0, :, torch.arange(33) != 7].isfinite().all()
    infinite = inputs["v"].clone()
    infinite[0, 4, 7] = torch.inf
    assert not wkv(**{**inputs, "v": infinite}, backend=backend)[0][0, 4:, 7].isfinite().any()
    ignored = inputs["k"].clone()
    ignored[0, 4, 7] = -torch.inf
    y, _ = wkv(**{**inputs, "k": ignored}, backend=backend)
    assert y.isfinite().all()


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = make_inputs(3, 100, 200)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(evaluate(functools.partial(as_wkv, cpu), inputs, None, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_torch_accepts_the_operator_registration():
    from spikescale.kernels.wkv.cpu import wkv_forward

    inputs = make_inputs(2, 20, 5)
    leaves = [x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(wkv_forward, (*leaves, make_reset(2, 20), True))
    torch.library.opcheck(wkv_forward, (*(x.detach() for x in leaves), None, False))


def test_wrong_shapes_are_refused():
    inputs = make_inputs(1, 4, 3)
    with pytest.raises(ValueError, match="w and u must be"):
        wkv(**{**inputs, "w": inputs["w"][:2]})
    with pytest.raises(ValueError, match="state must be"):
        wkv(**{**inputs, "state": inputs["state"][:, :2]})
    with pytest.raises(ValueError, match="reset must be"):
        wkv(**inputs, reset=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="time >= 1"):
        wkv(**{**inputs, "k": inputs["k"][:, :0], "v": inputs["v"][:, :0]})


def test_initial_state_is_empty():
    state = initial_state(2, 3)
    assert state.shape == (2, 3, 3)
    assert (state[:, :2] == 0).all()
    assert (state[:, 2] == -1e38).all()
