"""The decode engine against the model, in every variant and instruction set; its layouts and refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spikescale.config.schema import ModelConfig, NeuronConfig
from spikescale.inference.decoder import Decoder
from spikescale.kernels.build import instruction_sets
from spikescale.kernels.decode import layout
from spikescale.kernels.decode.cpu import library
from spikescale.model import SpikeGPT

VARIANTS = ("rwkv", "heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven")
BACKENDS = [f"cpu-{name}" for name in instruction_sets()]
VOCABULARY = 70


def make_model(variant: str = "spikegpt", width: int = 33, **changes: Any) -> SpikeGPT:
    """A model all of whose weights matter: as initialised, many projections are zero."""
    config = ModelConfig(
        variant=variant,
        layers=2,
        width=width,
        vocab_size=VOCABULARY,
        binary_embedding=variant != "rwkv",
        backend="reference",
        **changes,
    )
    model = SpikeGPT(config)
    generator = torch.Generator().manual_seed(width)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                # Neurons in front of the projections must be driven above their threshold.
                gain = 6.0 if variant == "spikegpt-driven" else 2.0
                parameter.copy_(gain * parameter.shape[1] ** -0.5 * noise)
            else:
                parameter.add_(0.1 * noise)
        if variant == "spikegpt-driven":
            for name, parameter in model.named_parameters():
                if name.endswith(("ln1.weight", "ln2.weight", "ln_out.weight")):
                    parameter.mul_(3)
    return model.eval()


def make_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def relative(actual: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 0.1
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def compare(
    model: SpikeGPT, decoder: Decoder, batch: int, length: int = 12, reference: SpikeGPT | None = None
) -> tuple[float, float]:
    """Largest relative difference of the logits, and largest difference of the state, to the model's."""
    tokens = make_tokens(batch, length)
    logits, state = (reference or model)(tokens)
    worst = max(relative(decoder.step(tokens[:, t]), logits[:, t]) for t in range(length))
    difference = 0.0
    for ours, theirs in zip(decoder.state(), state, strict=True):
        assert ours.keys() == theirs.keys()
        for key, expected in theirs.items():
            actual = ours[key]
            assert actual.shape == expected.shape
            if key == "time_mix.wkv":
                actual, expected = scaled(actual), scaled(expected)
            difference = max(difference, float(((actual - expected).abs() / (1 + expected.abs())).max()))
    return worst, difference


def scaled(wkv: Tensor) -> Tensor:
    """The mean of the values and the logarithm of the sum of the weights: free of the choice of exponent."""
    a, b, m = wkv.double().unbind(1)
    return torch.stack([a / b, b.log() + m])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "width"), [(1, 33), (3, 33), (32, 64)])
def test_float32_decoding_equals_the_model(backend, variant, batch, width):
    # A spike that differed would move a membrane by its whole threshold.
    model = make_model(variant, width)
    logits, state = compare(model, Decoder(model, backend=backend), batch)
    assert logits <= 1e-5
    assert state <= 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 13])
def test_widths_beyond_one_chunk_of_inputs(backend, batch):
    model = make_model("spikegpt", width=161)  # 644 inputs of the inner projection, in two chunks
    logits, state = compare(model, Decoder(model, backend=backend), batch, length=6)
    assert logits <= 1e-5
    assert state <= 2e-5


@pytest.mark.parametrize(
    "neuron",
    [
        NeuronConfig(tau=1.7, v_threshold=0.4, v_reset=-0.2),
        NeuronConfig(tau=2.0, v_threshold=0.6, soft_reset=True),
    ],
)
def test_the_neurons_settings_are_kept(neuron):
    model = make_model("spikegpt-b", neuron=neuron)
    logits, state = compare(model, Decoder(model), 3)
    assert logits <= 1e-5
    assert state <= 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_residual_stream_starts_on_the_models_grid(variant, monkeypatch):
    # The true grid is at float32's rounding; a coarse one shows whether it is applied, and to whom.
    monkeypatch.setattr("spikescale.model.norm.stream_grid", lambda layers: 0.25)
    model = make_model(variant)
    logits, _ = compare(model, Decoder(model), 2, length=6)
    assert logits <= 1e-5


def with_rounded_matrices(model: SpikeGPT) -> SpikeGPT:
    rounded = SpikeGPT(model.config)
    with torch.no_grad():
        for (name, target), source in zip(rounded.named_parameters(), model.parameters(), strict=True):
            matrix = source.dim() == 2 and name != "embedding.weight"
            target.copy_(source.bfloat16() if matrix else source)
    return rounded.eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_weights_of_few_rows_are_the_model_with_its_matrices_rounded(backend, variant):
    model = make_model(variant)
    decoder = Decoder(model, "bfloat16", backend)
    logits, state = compare(model, decoder, 3, reference=with_rounded_matrices(model))
    assert logits <= 1e-5
    assert state <= 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_weights_of_many_rows_round_activations_too_where_the_processor_multiplies_such(backend):
    model = make_model("rwkv", width=64)
    decoder = Decoder(model, "bfloat16", backend)
    logits, _ = compare(model, decoder, 32, reference=with_rounded_matrices(model))
    if library(backend).decode_has_bf16_dots():
        assert 1e-4 < logits <= 2e-2
    else:
        assert logits <= 1e-5


def test_bfloat16_weights_are_half_the_bytes():
    model = make_model(width=64)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n != "embedding.weight")
    padding = 64 * (96 - VOCABULARY)  # the head's outputs fill whole panels
    assert Decoder(model).bytes_per_step() == 4 * (matrices + padding)
    assert Decoder(model, "bfloat16").bytes_per_step() == 2 * (matrices + padding)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_number_of_threads_changes_no_bit(weights, batch):
    model, tokens = make_model(width=100), make_tokens(batch, 5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            decoder = Decoder(model, weights)
            results.append(torch.stack([decoder.step(tokens[:, t]) for t in range(5)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_the_weights_of_zero_activations_are_not_read(backend, weights):
    model = make_model("spikegpt", width=64)
    silent = torch.zeros(256, dtype=torch.bool)
    silent[:220] = True
    with torch.no_grad():
        for block in model.blocks:
            block.channel_mix.key.weight[silent] = 0
    expected = Decoder(model, weights, backend, skip_zeros=False)
    tokens = make_tokens(1, 6)
    full = torch.stack([expected.step(tokens[:, t]) for t in range(6)])
    with torch.no_grad():
        for block in model.blocks:
            block.channel_mix.value.weight[:, silent] = torch.nan
    skipping, reading = (Decoder(model, weights, backend, skip_zeros=skip) for skip in (True, False))
    assert relative(torch.stack([skipping.step(tokens[:, t]) for t in range(6)]), full) <= 1e-5
    assert reading.step(tokens[:, 0]).isnan().all()


def test_a_nan_comes_out_and_stays_in_its_row():
    model = make_model()
    decoder = Decoder(model)
    tokens = make_tokens(2, 3)
    decoder.step(tokens[:, 0])
    state = decoder.state()
    state[0]["time_mix.shift"][0, 5] = torch.nan
    clean = decoder.step(tokens[:, 1])
    decoder.load_state(state)
    logits = decoder.step(tokens[:, 1])
    assert not logits[0].isfinite().any()
    assert torch.equal(logits[1], clean[1])


def test_keys_far_from_zero_and_an_empty_past_lose_nothing():
    model = make_model("rwkv")
    with torch.no_grad():
        for block in model.blocks:
            block.time_mix.key.weight.mul_(20)
            block.time_mix.time_decay.fill_(-4)
    logits, state = compare(model, Decoder(model), 2, length=30)
    assert logits <= 1e-5
    assert state <= 2e-5


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_a_token_outside_the_vocabulary_is_refused_and_changes_nothing(wrong):
    decoder = Decoder(make_model())
    tokens = make_tokens(2, 1)[:, 0]
    decoder.step(tokens)
    before = decoder.state()
    with pytest.raises(ValueError, match=f"token {wrong} of row 1: the vocabulary has {VOCABULARY}"):
        decoder.step(torch.tensor([3, wrong]))
    for old, new in zip(before, decoder.state(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_batch_that_is_not_the_states_is_refused():
    decoder = Decoder(make_model())
    decoder.step(make_tokens(2, 1)[:, 0])
    with pytest.raises(ValueError, match=r"tokens must be \(2,\) torch.int64"):
        decoder.step(make_tokens(3, 1)[:, 0])


def test_a_panel_holds_the_weights_of_each_input_side_by_side():
    weight = torch.arange(40.0 * 3).view(40, 3)
    packed = layout.panels(weight, torch.float32)
    assert packed.shape == (2, 3, layout.PANEL)
    assert torch.equal(packed[0, 1], weight[:32, 1])
    assert torch.equal(packed[1, 2, :8], weight[32:, 2])
    assert packed[1, :, 8:].eq(0).all()


def test_bfloat16_panels_interleave_two_inputs():
    weight = torch.arange(40.0 * 3).view(40, 3)
    packed = layout.panels(weight, torch.bfloat16)
    assert packed.numel() == layout.packed_size(weight.shape, torch.bfloat16) == 2 * 4 * 32
    pairs = packed.view(2, 2, layout.PANEL, 2).float()
    assert torch.equal(pairs[0, 0, :, 1], weight[:32, 1])
    assert torch.equal(pairs[1, 1, :8, 0], weight[32:, 2])
    assert pairs[:, 1, :, 1].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_no_logits_and_keeps_the_state_empty(backend):
    model = make_model()
    decoder = Decoder(model, backend=backend)
    for _ in range(2):
        assert decoder.step(torch.zeros(0, dtype=torch.int64)).shape == (0, VOCABULARY)
    decoder.load_state(model.initial_state(0))
    assert decoder.step(torch.zeros(0, dtype=torch.int64)).shape == (0, VOCABULARY)
    assert decoder.state()[0]["time_mix.wkv"].shape == (0, 3, 33)
    with pytest.raises(ValueError, match=r"tokens must be \(0,\)"):
        decoder._engine.step(torch.zeros(1, dtype=torch.int64), 1)
