"""Spikes as bits: what is packed comes back, and what is no spike is not packed."""

import math

import pytest
import torch

from spikescale.kernels.build import instruction_sets
from spikescale.kernels.spike_bits import pack_spikes, unpack_spikes

BACKENDS = [*(f"cpu-{name}" for name in instruction_sets()), "reference"]


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


def test_the_layout_is_little_endian():
    spikes = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 0, 1])
    for backend in BACKENDS:
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
