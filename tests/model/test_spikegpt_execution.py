"""How a model is run changes no number: backends, compilation, checkpointing, precision, monitoring."""

import pytest
import torch
from model_cases import VARIANTS, make_config, make_model, make_tokens, record_spikes
from torch import nn

from spikescale.errors import UserError
from spikescale.model import SpikeGPT, language_model_loss
from spikescale.model.parts import Parts


def loss_and_gradients(model, forward=None, tokens=None):
    tokens = make_tokens() if tokens is None else tokens
    model.zero_grad()
    logits, _ = (model if forward is None else forward)(tokens)
    loss, _ = language_model_loss(logits[:, :-1], tokens[:, 1:], 1e-4)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected, tolerance):
    assert torch.allclose(actual[0], expected[0], rtol=1e-6)
    for name, wanted in expected[1].items():
        error = (actual[1][name] - wanted).norm() / wanted.norm().clamp_min(1e-6)
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("variant", VARIANTS)
def test_cpu_backend_has_the_losses_spikes_and_gradients_of_the_reference(variant):
    fast, plain = make_model(variant, backend="cpu"), make_model(variant, backend="reference")
    spikes = [record_spikes(model) for model in (fast, plain)]
    results = [loss_and_gradients(model) for model in (fast, plain)]
    assert_same_gradients(*results, 2e-4)
    for name, fired in spikes[1].items():
        assert torch.equal(spikes[0][name][0], fired[0]), name


@pytest.mark.parametrize("variant", ["spikegpt", "spikegpt-driven"])
def test_activation_checkpointing_is_bit_exact_with_dropout(variant):
    model = make_model(variant, dropout=0.2)
    results = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(0)
        results.append(loss_and_gradients(model))
    assert torch.equal(results[0][0], results[1][0])
    for name, expected in results[0][1].items():
        # A LayerNorm fused with the neurons before it sums its weights' gradients in another order.
        fused = ".ln" in name or name.startswith("ln_out")
        actual = results[1][1][name]
        assert float((actual - expected).norm()) <= (1e-6 if fused else 0) * float(expected.norm()), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "checkpointing", "compiler"),
    [
        ("spikegpt", True, "inductor"),
        ("spikegpt-driven", False, "aot_eager"),
        ("spikegpt-b", False, "aot_eager"),
    ],
)
def test_compiled_model_equals_eager_in_one_graph(variant, checkpointing, compiler):
    model = make_model(variant, layers=1)
    model.activation_checkpointing = checkpointing
    eager = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    assert_same_gradients(loss_and_gradients(model, compiled), eager, 1e-4)
    rates = []
    for _, neuron in model.neurons():
        neuron.monitor = True
    for forward in (model, compiled):
        with torch.set_grad_enabled(checkpointing):
            forward(make_tokens())
        rates.append([float(neuron.firing_rate) for _, neuron in model.neurons()])
    assert rates[0] == pytest.approx(rates[1], abs=1e-6)


@pytest.mark.slow
def test_compiling_with_the_reference_backend_works_with_graph_breaks():
    model = make_model(layers=1, width=8, backend="reference")
    eager = loss_and_gradients(model)
    assert_same_gradients(loss_and_gradients(model, torch.compile(model, backend="aot_eager")), eager, 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_keeps_state_normalisation_and_residual_in_float32(variant):
    model, tokens = make_model(variant), make_tokens()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm | nn.Linear):
            module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.dtype}))
    spikes = record_spikes(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model(tokens)
        loss, _ = language_model_loss(logits[:, :-1], tokens[:, 1:])
    loss.backward()
    assert {dtype for name, dtype in seen.items() if ".ln" in name or name == "ln_out"} == {torch.float32}
    assert seen["blocks.0.time_mix.key"] == torch.bfloat16
    assert {x.dtype for block in state for x in block.values()} == {torch.float32}
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    for fired in spikes.values():
        assert set(fired[0].unique().tolist()) <= {0.0, 1.0}


def test_bfloat16_loss_of_an_untrained_model_is_near_the_float32_one():
    model, tokens = SpikeGPT(make_config()), make_tokens()
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(float(language_model_loss(model(tokens)[0], tokens)[1]))
    assert losses[1] == pytest.approx(losses[0], abs=2e-2)


def test_a_float64_model_runs_in_float64_throughout():
    model, tokens = make_model(), make_tokens()
    expected = model(tokens)[0].detach()
    logits, state = model.double()(tokens)
    assert logits.dtype == torch.float64
    assert {x.dtype for block in state for x in block.values()} == {torch.float64}
    torch.testing.assert_close(logits.detach().float(), expected, rtol=1e-4, atol=1e-4)


def test_a_nan_weight_is_seen_in_the_logits():
    for variant in VARIANTS:
        model = make_model(variant)
        with torch.no_grad():
            model.blocks[0].time_mix.output.weight[0, 0] = torch.nan
            assert model(make_tokens())[0].isnan().any(), variant


def test_firing_rates_are_recorded_only_while_monitored():
    model, tokens = make_model(), make_tokens()
    spikes = record_spikes(model)
    model(tokens)
    assert all(neuron.firing_rate.isnan() for _, neuron in model.neurons())
    for _, neuron in model.neurons():
        neuron.monitor = True
    model(tokens)
    for name, neuron in model.neurons():
        assert neuron.firing_rate.dtype == torch.float32
        assert float(neuron.firing_rate) == pytest.approx(float(spikes[name][1].mean()), abs=1e-6)
        assert not neuron.firing_rate.requires_grad
    assert "firing_rate" not in " ".join(model.state_dict())


@pytest.mark.parametrize(
    ("variant", "count"),
    [("rwkv", 0), ("heaviside-rwkv", 5), ("spikegpt-b", 7), ("spikegpt", 5), ("spikegpt-driven", 16)],
)
def test_neurons_are_listed_by_name(variant, count):
    names = [name for name, _ in make_model(variant).neurons()]
    assert len(names) == count
    if variant == "spikegpt":
        assert names == [
            "embedding.neuron",
            "blocks.0.time_neuron",
            "blocks.0.channel_neuron",
            "blocks.1.time_neuron",
            "blocks.1.channel_neuron",
        ]


@pytest.mark.parametrize(("variant", "spiking"), [("spikegpt-driven", 15), ("spikegpt", 0)])
def test_every_projection_of_the_driven_variant_reads_spikes(variant, spiking):
    model, binary = make_model(variant), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, inputs, __: binary.append(bool(((inputs[0] == 0) | (inputs[0] == 1)).all()))
            )
    model(make_tokens())
    assert len(binary) == 2 * 7 + 1
    assert sum(binary) == spiking


class Halves(Parts):
    """Half of what can be divided, as if another process held the other half."""

    def vector(self, width):
        parameter = nn.Parameter(torch.empty(width // 2))
        parameter.whole = (width,)
        return parameter

    def column(self, in_features, out_features):
        linear = nn.Linear(in_features, out_features // 2, bias=False)
        linear.weight.whole = (out_features, in_features)
        return linear

    def row(self, in_features, out_features):
        linear = nn.Linear(in_features // 2, out_features, bias=False)
        linear.weight.whole = (out_features, in_features)
        return linear

    def full_shape(self, parameter):
        return getattr(parameter, "whole", tuple(parameter.shape))

    def local_slice(self, full, parameter):
        return full[tuple(slice(length) for length in parameter.shape)]


def test_projections_and_divided_vectors_are_made_by_the_given_parts():
    whole = dict(SpikeGPT(make_config(layers=1, width=8), seed=1).named_parameters())
    model = SpikeGPT(make_config(layers=1, width=8), seed=1, parts=Halves())
    halved = {name: tuple(p.shape) for name, p in model.named_parameters() if p.shape != whole[name].shape}
    assert halved == {
        "blocks.0.time_mix.time_decay": (4,),
        "blocks.0.time_mix.time_first": (4,),
        "blocks.0.time_mix.key.weight": (4, 8),
        "blocks.0.time_mix.value.weight": (4, 8),
        "blocks.0.time_mix.receptance.weight": (4, 8),
        "blocks.0.time_mix.output.weight": (8, 4),
        "blocks.0.channel_mix.key.weight": (16, 8),
        "blocks.0.channel_mix.receptance.weight": (4, 8),
        "blocks.0.channel_mix.value.weight": (8, 16),
    }
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, model.parts.local_slice(whole[name], parameter)), name
    assert model.count_parameters() == sum(parameter.numel() for parameter in whole.values())


def test_a_model_without_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"model\.vocab_size is not set"):
        SpikeGPT(make_config(vocab_size=None))
