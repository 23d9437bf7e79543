"""Fused neurons, sum, dropout, LayerNorm in Triton: spikes and membranes bit for bit, gradients to 1e-5."""

import itertools
import logging
import os

import pytest
import torch
import triton
import triton.language as tl
from triton_harness import MemoryViolation, bf16_rounding, checked_memory, mutated

from spikescale.kernels.lif_norm import lif_residual_norm
from spikescale.kernels.lif_norm import triton as implementation
from spikescale.kernels.lif_norm.reference import _mixed_int, dropout_keep
from spikescale.kernels.lif_norm.triton_kernels import STRETCH, dropout_factors

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: run pytest without -m gpu"
)

MODES = [
    {"soft_reset": soft, "detach_reset": detach}
    for soft, detach in itertools.product((False, True), repeat=2)
]
DEVICE_CODE = "spikescale.kernels.lif_norm.triton_kernels"
BACKWARD_CODE = "spikescale.kernels.lif_norm.triton_backward_kernels"
HOST_CODE = "spikescale.kernels.lif_norm.triton"


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Many boundaries in few tokens: chunks of 16, each warmed up for 8 tokens."""
    monkeypatch.setattr(implementation, "CHUNKS", (16,))
    monkeypatch.setattr(implementation, "WARM_UP", 8)


def make_inputs(batch, length, channels, seed=0):
    generator = torch.Generator().manual_seed(seed + length + channels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "x": normal(batch, length, channels) + 2,
        "current": normal(batch, length, channels) * 1.5 + 0.3,
        "v": normal(batch, channels) * 0.5,
        "weight": 1 + 0.2 * normal(channels),
        "bias": 0.2 * normal(channels),
    }


def near_constant(kind, length, channels):
    """Drives whose membranes forget their start late or never."""
    if kind == "silent":  # a start is halved at every token, and the last bit takes many
        return torch.randn(1, length, channels, generator=torch.Generator().manual_seed(1)) * 0.3
    if kind == "regular":  # fires at every fourth token or so, in a phase that its start decides for good
        return torch.full((1, length, channels), 1.06) + torch.arange(channels) * 1e-3
    generator = torch.Generator().manual_seed(2)  # "marginal": membranes within rounding of the threshold
    return 2 - torch.rand(1, length, channels, generator=generator) * 1e-6


def evaluate(tensors, dtype, reset=None, seed=5, **options):
    """(x', normed, v) and the gradients of all `tensors` by name, for fixed random output gradients."""
    leaves = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in tensors.items()}
    outputs = lif_residual_norm(
        leaves["x"],
        leaves["current"],
        leaves["v"],
        leaves.get("weight"),
        leaves.get("bias"),
        reset=reset,
        seed=seed,
        **{name: leaves[name] for name in ("tau", "v_threshold") if name in leaves},
        **options,
    )
    generator = torch.Generator().manual_seed(3)
    present = [output for output in outputs if output is not None]
    grads = [torch.randn(output.shape, generator=generator).to(dtype) for output in present]
    torch.autograd.backward(present, grads)
    results = [None if output is None else output.detach() for output in outputs]
    return results, {name: leaf.grad for name, leaf in leaves.items()}


def forward(tensors, backend, **options):
    with torch.no_grad():
        return lif_residual_norm(
            *(tensors.get(name) for name in ("x", "current", "v", "weight", "bias")),
            backend=backend,
            **options,
        )


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def assert_same_forward(actual, expected):
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[2], expected[2])
    if expected[1] is not None:
        assert relative(actual[1], expected[1]) <= 1e-6


def on_a_grid(tensors):
    # Coarse numbers: float32 and float64 compute the same membranes for some tokens, and so the same spikes.
    return {
        name: (tensor * 8).round() / 8 if name in ("current", "v") else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tau", "v_th", "v_reset"), [(2.0, 1.0, 0.0), (3.7, 0.8, -0.2)])
def test_spikes_and_membranes_are_the_references_bit_for_bit(mode, tau, v_th, v_reset):
    tensors = make_inputs(1, 63, 33)
    reset = torch.rand(1, 63, generator=torch.Generator().manual_seed(4)) < 0.05
    options = {"tau": tau, "v_threshold": v_th, "v_reset": v_reset, "reset": reset, "dropout": 0.1, **mode}
    assert_same_forward(forward(tensors, "triton", **options), forward(tensors, "reference", **options))


@pytest.mark.parametrize(
    ("kind", "soft_reset"), [("silent", False), ("regular", False), ("regular", True), ("marginal", True)]
)
def test_chunks_that_start_wrong_are_run_again_until_they_merge(kind, soft_reset):
    tensors = make_inputs(1, 100, 5)
    tensors["current"] = near_constant(kind, 100, 5)
    expected = forward(tensors, "reference", soft_reset=soft_reset)
    assert_same_forward(forward(tensors, "triton", soft_reset=soft_reset), expected)


def check_gradients(tensors, length, with_reset=True, **options):
    reset = torch.rand(1, length, generator=torch.Generator().manual_seed(4)) < 0.05 if with_reset else None
    results, grads = evaluate(tensors, torch.float32, reset, backend="triton", **options)
    expected, wanted = evaluate(tensors, torch.float64, reset, backend="reference", **options)
    assert torch.equal((results[0] - tensors["x"]) > 0.5, (expected[0] - tensors["x"].double()) > 0.5)
    for actual, other in zip(results, expected, strict=True):
        assert (actual is None and other is None) or relative(actual, other) <= 1e-6
    for name in tensors:
        assert relative(grads[name], wanted[name]) <= 1e-5, name


@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_the_float64_reference_over_the_same_spikes(mode):
    tensors = make_inputs(1, 40, 33)
    check_gradients(on_a_grid(tensors), 40, v_reset=-0.25, surrogate_alpha=4.0, **mode)


@pytest.mark.parametrize("mode", [MODES[0], MODES[2]])
def test_gradients_of_per_channel_time_constants_and_thresholds(mode):
    tensors = make_inputs(1, 21, 100)
    tensors["tau"] = 1.5 + torch.arange(100) / 50
    tensors["v_threshold"] = 0.6 + torch.arange(100) / 150
    check_gradients(tensors, 21, **mode)


def test_gradients_with_dropout_over_chunks_of_the_usual_length(monkeypatch):
    monkeypatch.undo()
    check_gradients(make_inputs(1, 100, 2), 100, dropout=0.3, seed=2**40 + 7)


def test_no_gradient_in_gives_none_out_though_a_chunk_would_amplify_it(monkeypatch):
    # At the threshold f is 32, and a token multiplies by -16: 1e38 after 32 of them.
    monkeypatch.setattr(implementation, "CHUNKS", (40,))
    x, current = torch.zeros(1, 80, 2), torch.full((1, 80, 2), 2.0, requires_grad=True)
    x_out, _, v = lif_residual_norm(x, current, None, None, None, surrogate_alpha=64.0, backend="triton")
    assert (x_out == 1).all()
    (grad,) = torch.autograd.grad([x_out, v], current, [torch.zeros_like(x_out), torch.zeros_like(v)])
    assert not grad.any()


@pytest.mark.parametrize("channels", [1, 100])
def test_one_token(channels):
    tensors = make_inputs(1, 1, channels)
    if channels == 1:
        del tensors["weight"], tensors["bias"]
    check_gradients(on_a_grid(tensors), 1)


def test_outputs_without_a_gradient_count_as_zero():
    tensors = make_inputs(1, 20, 5)
    for used in range(3):
        grads = []
        for backend in ("triton", "reference"):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
            outputs = lif_residual_norm(*leaves.values(), backend=backend)
            outputs[used].square().sum().backward()
            grads.append([leaf.grad for leaf in leaves.values()])
        for actual, expected in zip(*grads, strict=True):
            if expected is None or not expected.any():
                assert actual is None or not actual.any()
            else:
                assert relative(actual, expected) <= 1e-5


def test_dropout_drops_what_the_hash_says_and_scales_the_rest():
    tensors = make_inputs(2, 21, 33)
    seed = 3 * 2**33 + 11
    plain, _, _ = forward(tensors, "triton")
    dropped, _, _ = forward(tensors, "triton", dropout=0.25, seed=seed)
    keep = dropout_keep(plain.shape, 0.25, seed)
    assert torch.equal(dropped, plain * (keep * (1 / 0.75)))
    assert 0.7 < keep.float().mean() < 0.8


@triton.jit
def _factors_kernel(factors, row, seed_low, seed_high, drop_below, C: tl.constexpr):
    c = tl.arange(0, C)
    tile = dropout_factors(row.to(tl.int64), c, seed_low, seed_high, drop_below, 1.0, C)
    tl.store(factors + c[:, None] + tl.arange(0, STRETCH)[None, :] * C, tile)


def test_dropout_beyond_four_billion_elements_uses_both_halves_of_the_place():
    row, channels, seed = 2**29 - 2, 8, 77  # place 2^32 lies in the middle of the stretch
    factors = torch.empty(STRETCH.value, channels)
    _factors_kernel[(1,)](factors, row, seed, 0, 2**30, C=channels)
    for i, factor in enumerate(factors.flatten().tolist()):
        place = row * channels + i
        bits = _mixed_int((place & 0xFFFFFFFF) ^ _mixed_int(seed))
        bits = _mixed_int(bits ^ (place >> 32) ^ _mixed_int(0x9E3779B9))
        assert factor == (bits >= 2**30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_currents_fire_like_the_same_numbers_in_float32(dtype):
    tensors = make_inputs(1, 30, 33)
    low = tensors["current"].to(dtype)
    grads = []
    with bf16_rounding():
        for current in (low, low.float()):
            leaf = current.clone().requires_grad_()
            x, normed, _ = lif_residual_norm(
                tensors["x"], leaf, None, tensors["weight"], tensors["bias"], backend="triton"
            )
            (x * normed).sum().backward()
            grads.append((x, leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert grads[0][1].dtype == dtype
    assert torch.equal(grads[0][1], grads[1][1].to(dtype))


def test_chunks_equal_the_whole_and_non_contiguous_inputs_the_contiguous_ones():
    tensors = make_inputs(2, 30, 10)
    whole = forward(tensors, "triton")
    halves = {name: tensors[name].repeat_interleave(2, dim=-1)[..., ::2] for name in ("x", "current", "v")}
    first = forward({**tensors, "x": halves["x"][:, :13], "current": halves["current"][:, :13]}, "triton")
    rest = {"x": halves["x"][:, 13:], "current": halves["current"][:, 13:], "v": first[2]}
    second = forward({**tensors, **rest}, "triton")
    assert not rest["x"].is_contiguous()
    for i in range(2):
        assert torch.equal(torch.cat([first[i], second[i]], 1), whole[i])
    assert torch.equal(second[2], whole[2])


def test_a_nan_current_stays_visible_from_its_token_on():
    tensors = make_inputs(1, 30, 5)
    tensors["current"][0, 9, 2] = torch.nan
    x, normed, v = forward(tensors, "triton")
    assert x[0, 9:, 2].isnan().all()
    assert x[0, :, [0, 1, 3, 4]].isfinite().all()
    assert normed[0, :9].isfinite().all()
    assert normed[0, 9:].isnan().all()
    assert v.isnan().tolist() == [[False, False, True, False, False]]


def test_more_channels_than_a_program_holds_run_in_parts_and_say_so_once(monkeypatch, caplog):
    monkeypatch.setattr(implementation, "MAX_CHANNELS", 4)
    tensors = make_inputs(1, 10, 5)
    with caplog.at_level(logging.WARNING, logger="spikescale.kernels"):
        actual = [forward(tensors, "triton", dropout=0.2, seed=9) for _ in range(2)][1]
    assert_same_forward(actual, forward(tensors, "reference", dropout=0.2, seed=9))
    said = [record.getMessage() for record in caplog.records if "run in parts" in record.getMessage()]
    assert said == [
        "lif_norm: 5 channels are more than the 4 of the fused kernel: neurons, sum and norm run in parts"
    ]


def test_torch_accepts_the_operator_registration():
    tensors = {name: tensor.requires_grad_() for name, tensor in make_inputs(1, 5, 3).items()}
    reset = torch.zeros(1, 5, dtype=torch.bool)
    options = (1e-5, 2.0, 1.0, 0.0, False, False, 2.0, 0.1, 3)
    inputs = (*tensors.values(), None, None, reset, *options)
    torch.library.opcheck(implementation.lif_norm_triton, inputs)


def test_programs_touch_only_their_own_memory_in_any_order():
    tensors = make_inputs(2, 21, 33)
    tensors["tau"], tensors["v_threshold"] = torch.full((33,), 2.5), torch.full((33,), 0.9)
    reset = torch.rand(2, 21, generator=torch.Generator().manual_seed(4)) < 0.05
    options = {"reset": reset, "dropout": 0.1, "backend": "triton"}
    results, grads = evaluate(tensors, torch.float32, **options)
    with checked_memory(seed=1):
        checked_results, checked_grads = evaluate(tensors, torch.float32, **options)
    for actual, expected in zip(checked_results, results, strict=True):
        assert torch.equal(actual, expected)
    for name in tensors:
        assert torch.equal(checked_grads[name], grads[name]), name


def shorten(module):
    module.CHUNKS, module.WARM_UP = (16,), 8


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("passed - passed * inverse", "passed"),  # the gain of a chunk
        ("scaled - x_hat * along[None, :] - shared[None, :]", "scaled - x_hat * along[None, :]"),
        ("grad_v = tl.where(here, before, grad_v)", "grad_v = before"),  # the tokens past the end
    ],
)
def test_an_error_planted_in_the_gradient_is_found(old, new):
    tensors = on_a_grid(make_inputs(1, 38, 5))
    with mutated(BACKWARD_CODE, old, new, [HOST_CODE]) as module:
        shorten(module)
        with pytest.raises(AssertionError):
            check_gradients(tensors, 38, with_reset=False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if any_of(changed):", "if any_of(lane & (c < 0)):"),  # wrong rows stay
        ("walking = any_of(bits_differ(v, assumed, lane))", "walking = t % CHUNK == 0"),  # stops too soon
        (
            "tl.where(flags != 0, boundaries, chunks)",
            "tl.where(flags > 1, boundaries, chunks)",
        ),  # never starts
    ],
)
def test_an_error_planted_in_the_fix_up_is_found(old, new):
    tensors = make_inputs(1, 64, 3)
    tensors["current"] = near_constant("regular", 64, 3)
    expected = forward(tensors, "reference")
    with mutated(DEVICE_CODE, old, new, [HOST_CODE]) as module:
        shorten(module)
        with pytest.raises(AssertionError):
            assert_same_forward(forward(tensors, "triton"), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.store(first + i * C, rows[i].to(target.dtype.element_ty), mask=here)",
         "tl.store(first + i * C, rows[i].to(target.dtype.element_ty), mask=lane)"),
        ("tl.load(first + i * C, mask=here, other=0.0)", "tl.load(first + i * C, mask=lane, other=0.0)"),
    ],
)  # fmt: skip
def test_an_error_planted_in_a_boundary_mask_is_found(old, new):
    tensors = make_inputs(1, 18, 3)
    with mutated(DEVICE_CODE, old, new, [HOST_CODE]) as module:
        shorten(module)
        with checked_memory(seed=0), pytest.raises(MemoryViolation):
            forward(tensors, "triton")


def test_chunks_are_long_where_programs_are_many_and_short_where_they_are_few(monkeypatch):
    monkeypatch.undo()
    assert implementation.chunk_length(8, 1024) == 32
    assert implementation.chunk_length(32, 1024) == 64
    assert implementation.chunk_length(8, 65536) == 256
    assert implementation.chunk_length(1, 1) == 32
