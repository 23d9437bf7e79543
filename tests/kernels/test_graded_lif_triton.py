"""Graded spikes in Triton, interpreted: the definition's bits and gradients, and planted errors found."""

import os

import pytest
import torch
import triton  # noqa: F401
from triton_harness import checked_memory, mutated

from spikescale.kernels.lif import graded_lif

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: run pytest without -m gpu"
)

DEVICE, HOST = "spikescale.kernels.lif.triton_graded", "spikescale.kernels.lif.graded_triton"
KINDS = {"3": (3, False), "sign": (1, True), "3 and sign": (3, True)}
MODES = {
    f"{'soft' if soft else 'hard'}{'-detached' if detach else ''}": (soft, detach)
    for soft in (False, True)
    for detach in (False, True)
}


def evaluate(backend, shape, kind, mode, dtype=torch.float32, tau=None, wide=False):
    """Spikes, final v and the gradients of x, v, tau, v_threshold; `wide`: all of it in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    batch, length, channels = shape
    x = (2 * torch.randn(batch, channels, length, generator=generator)).transpose(1, 2).to(dtype)
    v = torch.randn(batch, channels, generator=generator)
    reset = torch.rand(batch, length, generator=generator) < 0.1
    taus = 1.1 + torch.rand(channels, generator=generator)
    thresholds = 0.2 + torch.rand(channels, generator=generator)
    weights = torch.randn(batch, length, channels, generator=generator).to(dtype)
    tensors = [x, v, taus, thresholds]
    x, v, taus, thresholds = leaves = [
        (tensor.double() if wide else tensor).detach().requires_grad_() for tensor in tensors
    ]
    spikes, end = graded_lif(
        x,
        v,
        levels=kind[0],
        signed=kind[1],
        tau=taus if tau is None else tau,
        v_threshold=thresholds if tau is None else 0.5,
        v_reset=-0.1,
        soft_reset=mode[0],
        detach_reset=mode[1],
        surrogate_alpha=3.0,
        reset=reset,
        backend=backend,
    )
    wanted = leaves if tau is None else leaves[:2]
    end_weights = weights[:, 0].to(end.dtype)
    loss = (spikes * weights).sum().to(end.dtype) + (end * end_weights).sum()
    return [spikes.detach(), end.detach()], torch.autograd.grad(loss, wanted)


def assert_equals_definition(shape, kind, mode, **options):
    outputs, gradients = evaluate("triton", shape, kind, mode, **options)
    expected, _ = evaluate("reference", shape, kind, mode, **options)
    exact, wanted = evaluate("reference", shape, kind, mode, wide=True, **options)
    for actual, bits in zip(outputs, expected, strict=True):
        assert torch.equal(actual, bits)
    assert torch.equal(outputs[0].double(), exact[0])  # else the gradients are those of other spikes
    for actual, right in zip(gradients, wanted, strict=True):
        assert (actual.double() - right).norm() <= 1e-5 * right.norm()
    return outputs[0]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_fires_bit_for_bit_like_the_definition_and_has_the_float64_gradients(kind, mode):
    spikes = assert_equals_definition((1, 22, 5), kind, mode)
    assert spikes.max() == kind[0]
    assert spikes.min() == (-kind[0] if kind[1] else 0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 32, 3), (2, 17, 70)])
def test_odd_shapes_stay_in_their_memory_in_any_order(shape):
    with checked_memory(seed=0):
        assert_equals_definition(shape, (2, True), (False, False))


@pytest.mark.parametrize("tau", [1.0, 2.0, 3.7])
def test_numbers_serve_all_channels(tau):
    assert_equals_definition((1, 22, 3), (3, True), (False, False), tau=tau)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_is_float32_inside(dtype):
    low, gradients = evaluate("triton", (1, 22, 5), (3, True), (True, False), dtype)
    high, wanted = evaluate("reference", (1, 22, 5), (3, True), (True, False), dtype)
    assert low[0].dtype == dtype and low[1].dtype == torch.float32
    assert torch.equal(low[0], high[0]) and torch.equal(low[1], high[1])
    assert gradients[0].dtype == dtype
    for actual, right in zip(gradients, wanted, strict=True):
        assert (actual - right).float().norm() <= 0.01 * right.float().norm()


def test_no_number_and_infinity_stay_visible():
    x = torch.ones(1, 8, 2)
    x[0, 2, 0], x[0, 3, 1] = torch.nan, torch.inf
    for soft in (False, True):
        options = {"levels": 3, "signed": True, "v_threshold": 0.25, "soft_reset": soft}
        found = graded_lif(x, backend="triton", **options)
        wanted = graded_lif(x, backend="reference", **options)
        for actual, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert found[0][0, 2:, 0].isnan().all()


PLANTED = {
    "last level": ("for k in range(2, LEVELS + 1):", "for k in range(2, LEVELS):"),
    "boundary": ("membrane = tl.where(inside, after, membrane)", "membrane = after"),
    "weight of a level": ("by_threshold -= times * up", "by_threshold -= up"),
    "sign of the reset": ("through -= kept * second", "through += kept * second"),
    "reset mask": ("before = tl.where(bit(resets, i), 0.0, before)", "before = before * 1.0"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_found(name):
    with mutated(DEVICE, *PLANTED[name], [HOST]), pytest.raises(AssertionError):
        assert_equals_definition((1, 22, 5), (3, True), (False, False))
