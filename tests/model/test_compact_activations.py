"""The residual stream is exact, so backward can keep counts and bits: same gradients, less memory."""

import logging

import pytest
import torch
from model_cases import VARIANTS, make_config, make_model, make_tokens

from spikescale.model import SpikeGPT
from spikescale.model import recompute as recomputation
from spikescale.model.loss import language_model_loss
from spikescale.model.norm import on_grid, stream_grid
from spikescale.model.recompute import SpikeCounts

SPIKING_STREAMS = ("heaviside-rwkv", "spikegpt-b", "spikegpt")


def gradients(model, recompute, compact, autocast=False):
    model.activation_checkpointing, model.compact_activations = recompute, compact
    tokens = make_tokens()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, _ = model(tokens)
    loss, _ = language_model_loss(logits, tokens, 1e-4)
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same(model, actual, expected):
    """Bit for bit, but for the LayerNorms' weights: fused with neurons, their sums run in another order."""
    for (name, _), a, b in zip(model.named_parameters(), actual, expected, strict=True):
        if ".ln" in name or name.startswith("ln_out"):
            assert float((a - b).norm()) <= 1e-6 * float(b.norm()), name
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_and_compact_gradients_are_the_same_bits(variant, autocast):
    model = make_model(variant)
    expected = gradients(model, False, False, autocast)
    for recompute, compact in ((False, True), (True, False), (True, True)):
        actual = gradients(model, recompute, compact, autocast)
        assert_same(model, actual, expected)


def test_recomputation_repeats_dropout_to_the_bit():
    model = make_model(dropout=0.2)
    plain, again = gradients(model, False, True), gradients(model, True, True)
    assert_same(model, again, plain)
    model.eval()
    assert not torch.equal(gradients(model, False, True)[0], plain[0])


def counts_kept(model, recompute, compact):
    """What the blocks' inputs were packed into between forward and backward."""
    model.activation_checkpointing, model.compact_activations = recompute, compact
    packed = []
    original = SpikeCounts.pack

    def watching(self, x):
        kept = original(self, x)
        if isinstance(kept, tuple):
            packed.append(kept[0])
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpikeCounts, "pack", watching)
        model(make_tokens())[0].sum().backward()
    return packed


@pytest.mark.parametrize("variant", SPIKING_STREAMS)
def test_block_inputs_are_kept_in_one_byte_an_element(variant):
    model = make_model(variant, layers=3)
    packed = counts_kept(model, recompute=True, compact=True)
    assert len(packed) == 3
    assert all(counts.dtype == torch.uint8 and counts.shape == (2, 40, 33) for counts in packed)
    assert int(packed[-1].max()) > 0
    assert counts_kept(model, recompute=True, compact=False) == []


def test_spikes_that_projections_read_are_kept_as_bits(monkeypatch):
    kept = []
    original = recomputation.pack_spikes

    def counting(spikes):
        bits = original(spikes)
        kept.append((spikes.numel(), None if bits is None else bits.numel()))
        return bits

    monkeypatch.setattr(recomputation, "pack_spikes", counting)
    counts = {}
    for variant in VARIANTS:
        kept.clear()
        make_model(variant, layers=1)(make_tokens())
        counts[variant] = sum(bits is not None for _, bits in kept)
        assert all(bits is None or bits == -(-elements // 8) for elements, bits in kept)
    assert counts == {"rwkv": 0, "heaviside-rwkv": 0, "spikegpt-b": 1, "spikegpt": 0, "spikegpt-driven": 7}


def test_a_stream_that_is_no_count_of_spikes_is_kept_as_it_is_and_said_once(caplog, monkeypatch):
    monkeypatch.setattr(recomputation, "_said", set())
    counts = SpikeCounts(torch.zeros(1, 2, 3))
    exact = torch.tensor([[[0.0, 1, 2], [255, 3, 0]]])
    assert torch.equal(counts.unpack(counts.pack(exact)), exact)
    with caplog.at_level(logging.INFO, "spikescale.model"):
        for strange in (exact + 0.5, exact + 1, -exact, exact * torch.nan):
            assert counts.pack(strange) is strange
    assert len(caplog.records) == 1
    other = torch.zeros(2, 3)
    assert counts.pack(other) is other


@pytest.mark.parametrize("layers", [1, 4, 12, 24, 48])
def test_sums_of_spikes_on_the_grid_are_exact(layers):
    start = torch.randn(10000, generator=torch.Generator().manual_seed(layers)) * 4
    start = on_grid(start.clamp(-16, 16), layers)
    assert float((start / stream_grid(layers) - (start / stream_grid(layers)).round()).abs().max()) == 0
    stream = start.clone()
    for _ in range(2 * layers):
        stream += 1
    assert torch.equal(stream.double(), start.double() + 2 * layers)
    assert torch.equal(stream - start, torch.full_like(start, 2 * layers))


def test_rounding_to_the_grid_moves_by_at_most_half_of_it_and_lets_gradients_through():
    for dtype in (torch.float32, torch.float64):
        x = (torch.randn(1000, dtype=dtype) * 3).requires_grad_()
        rounded = on_grid(x, 12)
        assert float((rounded - x).abs().max()) <= stream_grid(12) / 2
        (rounded * 3).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert stream_grid(12) == 2.0**-18


@pytest.mark.parametrize("variant", ["spikegpt", "spikegpt-b"])
def test_fused_neurons_compute_what_observed_ones_do(variant):
    model, tokens = make_model(variant), make_tokens()
    fused = model(tokens)[0].detach()
    for _, neuron in model.neurons():
        neuron.register_forward_hook(lambda *_: None)
    assert torch.equal(model(tokens)[0].detach(), fused)


def test_dropout_scales_and_drops_the_stream():
    model = SpikeGPT(make_config(dropout=0.5, layers=1, width=64))
    seen = []
    model.ln_out.register_forward_hook(lambda _, __, output: seen.append(output[0].detach()))
    torch.manual_seed(0)
    model(make_tokens())
    share = float((seen[0] == 0).float().mean())
    assert 0.47 < share < 0.53
    model(make_tokens())
    assert not torch.equal(seen[0], seen[1])
