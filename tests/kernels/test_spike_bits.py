"""Spikes as bits: what is packed comes back, and what is no spike is not packed."""

import contextlib
import math
import os

import pytest
import torch

from spikescale.kernels.build import instruction_sets
from spikescale.kernels.spike_bits import pack_spikes, pack_sure_spikes, unpack_spikes

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: run pytest without -m gpu"
)
TRITON = pytest.param("triton", marks=interpreted)
BACKENDS = [*(f"cpu-{name}" for name in instruction_sets()), "reference", TRITON]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 63, 33), (3, 50000)])
def test_spikes_come_back_from_an_eighth_of_a_byte_each(shape, dtype, backend):
    generator = torch.Generator().manual_seed(sum(shape))
    spikes = (torch.rand(shape, generator=generator) < 0.3).to(dtype)
    bits = pack_spikes(spikes, backend)
    assert bits.numel() == math.ceil(spikes.numel() / 8)
    back = unpack_spikes(bits, spikes.shape, dtype, backend)
    assert back.dtype == dtype
    assert torch.equal(back, spikes)
    assert torch.equal(bits, pack_spikes(spikes, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layout_is_little_endian(backend):
    spikes = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 0, 1])
    assert pack_spikes(spikes, backend).tolist() == [0b00001001, 0b10]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stranger", [0.5, math.nan, 2.0, -1.0, math.inf])
@pytest.mark.parametrize("place", [3, 130])
def test_anything_but_0_and_1_is_not_packed(stranger, place, backend):
    spikes = torch.ones(131)
    spikes[place] = stranger
    assert pack_spikes(spikes, backend) is None


def test_transposed_spikes_keep_their_order():
    spikes = (torch.rand(6, 9) < 0.5).float().T
    assert torch.equal(unpack_spikes(pack_spikes(spikes), spikes.shape, torch.float32), spikes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_that_are_sure_come_back_too(dtype, backend):
    spikes = (torch.rand(3, 9001, generator=torch.Generator().manual_seed(1)) < 0.3).to(dtype)
    bits = pack_sure_spikes(spikes, backend)
    # On a GPU a flag for every 8192 elements stays with them.
    assert bits.numel() == 3376 + (4 if backend == "triton" else 0)
    assert torch.equal(unpack_spikes(bits, spikes.shape, dtype, backend), spikes)


@interpreted
@pytest.mark.parametrize("stranger", [0.5, math.nan, 2.0, -1.0])
def test_what_was_surely_a_spike_and_is_none_comes_back_as_nan_and_never_as_a_number(stranger):
    spikes = (torch.rand(20000, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    broken = spikes.clone()
    broken[9000] = stranger
    back = unpack_spikes(pack_sure_spikes(broken, "triton"), broken.shape, torch.float32, "triton")
    beside = torch.arange(20000) // 8192 == 9000 // 8192
    assert back[beside].isnan().all()
    assert torch.equal(back[~beside], spikes[~beside])
    # Where the CPU can say so without waiting, it does.
    assert pack_sure_spikes(broken, "cpu") is None


@interpreted
def test_programs_touch_only_their_own_memory_in_any_order():
    from triton_harness import checked_memory

    spikes = (torch.rand(2, 4101) < 0.3).float()
    with checked_memory(seed=0):
        bits = pack_spikes(spikes, "triton")
        back = unpack_spikes(bits, spikes.shape, torch.float32, "triton")
        sure = unpack_spikes(pack_sure_spikes(spikes, "triton"), spikes.shape, torch.float32, "triton")
    assert torch.equal(bits, pack_spikes(spikes, "reference"))
    assert torch.equal(back, spikes) and torch.equal(sure, spikes)


@interpreted
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask=byte * 8 < size)\n    strange", "mask=byte >= 0)\n    strange"),
        ("<< place[None, :]", "<< (7 - place)[None, :]"),
        ("tl.where(fired, False, spike != 0.0)", "tl.where(fired, False, spike > 0.0)"),
    ],
)
def test_planted_errors_are_found(old, new):
    from triton_harness import MemoryViolation, checked_memory, mutated

    spikes = (torch.arange(8200) % 3 == 0).float()
    with mutated("spikescale.kernels.spike_bits.triton", old, new) as module, checked_memory(seed=0):
        try:
            found = not torch.equal(module.pack_spikes_triton(spikes), pack_spikes(spikes, "reference"))
        except MemoryViolation:
            found = True
        spikes[8197] = -1.0
        found = found or module.pack_spikes_triton(spikes) is not None
    assert found


@interpreted
@pytest.mark.parametrize(("tokens", "waits"), [(6, False), (4, True)])
def test_a_projection_waits_for_a_gpu_only_where_its_weight_might_be_taken_for_spikes(
    tokens, waits, monkeypatch
):
    from spikescale.kernels import gpu
    from spikescale.model import recompute

    asked = []

    def on_triton(function):
        def call(*arguments):
            asked.append(function.__name__)
            return function(*arguments, backend="triton")

        return call

    for function in (pack_spikes, pack_sure_spikes, unpack_spikes):
        monkeypatch.setattr(recompute, function.__name__, on_triton(function))
    monkeypatch.setattr(gpu, "on_device", lambda x: contextlib.nullcontext())
    linear = torch.nn.Linear(8, 4, bias=False)
    spikes = (torch.rand(1, tokens, 8, generator=torch.Generator().manual_seed(3)) < 0.4).float()
    grad = torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(4))
    (expected,) = torch.autograd.grad(linear(spikes), linear.weight, grad)
    for stranger in (None, math.nan):
        x = spikes.clone().requires_grad_()
        if stranger is not None:
            x.data[0, 1, 5] = stranger
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
            y = recompute.project(linear, x, True)
        # The weight, of the spikes' size, is looked at and kept as it is.
        assert set(asked) == ({"pack_spikes"} if waits else {"pack_sure_spikes"})
        grad_weight, grad_x = torch.autograd.grad(y, [linear.weight, x], grad)
        assert torch.equal(grad_x, grad @ linear.weight)
        if stranger is None:
            assert torch.equal(grad_weight, expected)
        else:
            assert grad_weight[:, 5].isnan().all()
