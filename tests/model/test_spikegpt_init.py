"""Initial weights by formula, the same however the model is made; and parameter counts of the presets."""

import math

import pytest
import torch
from model_cases import VARIANTS, closed_form_count, make_config, make_model

from spikescale.config import load_model_preset
from spikescale.model import SpikeGPT
from spikescale.model.init import initial_value

LAYERS, WIDTH, VOCABULARY = 3, 10, 40


@pytest.fixture(scope="module")
def parameters():
    model = SpikeGPT(make_config(layers=LAYERS, width=WIDTH, vocab_size=VOCABULARY), seed=7)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_vectors_follow_their_formulas(parameters):
    for layer in range(LAYERS):
        a, z = layer / (LAYERS - 1), 1 - layer / LAYERS
        for i in range(WIDTH):
            ratio = i / WIDTH
            expected = {
                "time_mix.mu_key": ratio**z,
                "time_mix.mu_value": ratio**z + 0.3 * a,
                "time_mix.mu_receptance": ratio ** (z / 2),
                "channel_mix.mu_key": ratio**z,
                "channel_mix.mu_receptance": ratio**z,
                "time_mix.time_decay": -5 + 8 * (i / (WIDTH - 1)) ** (0.7 + 1.3 * a),
                "time_mix.time_first": math.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
            }
            for name, value in expected.items():
                actual = float(parameters[f"blocks.{layer}.{name}"][i])
                assert actual == pytest.approx(value, rel=1e-6, abs=1e-7), (layer, i, name)


def test_zero_and_orthogonal_matrices(parameters):
    for layer in range(LAYERS):
        for name in ("time_mix.key", "time_mix.receptance", "time_mix.output", "channel_mix.value"):
            assert (parameters[f"blocks.{layer}.{name}.weight"] == 0).all()
        assert (parameters[f"blocks.{layer}.channel_mix.receptance.weight"] == 0).all()
    identity = torch.eye(WIDTH)
    gains = {
        "blocks.1.time_mix.value.weight": 1.0,
        "blocks.1.channel_mix.key.weight": 2.0,
        "embedding.weight": 1e-4 * math.sqrt(VOCABULARY),
        "head.weight": 0.5 * math.sqrt(VOCABULARY / WIDTH),
    }
    for name, gain in gains.items():
        gram = parameters[name].T @ parameters[name]
        torch.testing.assert_close(gram / gain**2, identity, rtol=0, atol=1e-5, msg=name)


def test_a_head_narrower_than_the_model_has_gain_one_half():
    weight = initial_value("head.weight", (6, 10), make_config(width=10, vocab_size=6), 0)
    torch.testing.assert_close(weight @ weight.T, 0.25 * torch.eye(6), rtol=0, atol=1e-6)
    table = initial_value("embedding.weight", (6, 10), make_config(width=10, vocab_size=6), 0)
    torch.testing.assert_close(table @ table.T * 1e8, 10 * torch.eye(6), rtol=0, atol=1e-4)


def test_norms_start_as_identity(parameters):
    for name, value in parameters.items():
        if ".ln" in name or name.startswith("ln_"):
            assert (value == (1.0 if name.endswith("weight") else 0.0)).all()


def test_weights_depend_on_seed_and_name_only(parameters):
    config = make_config(layers=LAYERS, width=WIDTH, vocab_size=VOCABULARY)
    torch.manual_seed(123)
    again = SpikeGPT(config, seed=7)
    for name, value in again.named_parameters():
        assert torch.equal(value, parameters[name]), name
        assert torch.equal(initial_value(name, value.shape, config, 7), parameters[name]), name
    other = dict(SpikeGPT(config, seed=8).named_parameters())
    assert not torch.equal(other["head.weight"], parameters["head.weight"])
    first, second = (parameters[f"blocks.{layer}.time_mix.value.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_layer_and_one_channel_start_finite(variant):
    for layers, width in ((1, 1), (1, 4), (2, 1)):
        model = SpikeGPT(make_config(variant, layers=layers, width=width))
        assert all(p.isfinite().all() for p in model.parameters())


def test_all_variants_share_parameter_names_and_values():
    models = [SpikeGPT(make_config(variant)) for variant in VARIANTS]
    first = dict(models[0].named_parameters())
    for model in models[1:]:
        others = dict(model.named_parameters())
        assert others.keys() == first.keys()
        assert all(torch.equal(others[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "count", "rounded"),
    [
        ("46m", 256, 41_226_240, 41.2),
        ("216m", 50277, 215_399_424, 215.4),
        ("430m", 50277, 430_397_440, 430.4),
        ("1b2", 50277, None, 1182.6),
        ("tiny", 256, None, 0.92),
    ],
)
def test_presets_have_the_published_sizes(preset, vocabulary, count, rounded):
    config = load_model_preset(preset, vocab_size=vocabulary)
    with torch.device("meta"):
        model = SpikeGPT(config)
    total = model.count_parameters()
    assert total == closed_form_count(config.layers, config.width, vocabulary)
    assert count is None or total == count
    assert total / 1e6 == pytest.approx(rounded, abs=0.06)
    assert model.count_parameters(embeddings=False) == total - vocabulary * config.width


def test_count_includes_every_parameter_once():
    model = make_model()
    assert model.count_parameters() == sum(p.numel() for p in model.parameters())
