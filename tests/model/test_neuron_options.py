"""Neurons beyond SpikeGPT's: learnt constants, graded and signed spikes, normalised currents."""

import math

import pytest
import torch
from model_cases import make_config, make_model, make_tokens, record_spikes
from pydantic import ValidationError

from spikescale.config import ModelConfig, NeuronConfig, RunConfig
from spikescale.inference.decoder import obstacle_to_decoding
from spikescale.kernels.lif import lif
from spikescale.model import SpikeGPT
from spikescale.model.neuron import LIF
from spikescale.planning.parameters import count

OPTIONS = {
    "learned": {"learn_tau": True, "learn_threshold": True, "v_threshold": 0.4},
    "graded": {"bits": 2, "v_threshold": 0.3},
    "signed": {"signed": True, "v_threshold": 0.4},
    "normalised": {"normalise_current": True},
    "all": {
        "learn_tau": True,
        "learn_threshold": True,
        "bits": 3,
        "signed": True,
        "normalise_current": True,
        "soft_reset": True,
        "v_threshold": 0.3,
    },
}
SPIKING = ("spikegpt-b", "spikegpt", "spikegpt-driven")


@pytest.mark.parametrize("variant", SPIKING)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_forms_agree_and_every_parameter_learns(options, variant):
    model = make_model(variant, neuron=NeuronConfig(**options))
    tokens = make_tokens()
    spikes = record_spikes(model)
    whole, _ = model(tokens)
    whole.logsumexp(-1).mean().backward()
    # Shifting all logits alike is all that a head's bias could do; every weight else matters.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    fired = torch.cat([s.flatten() for name, (s,) in spikes.items() if not name.startswith("embedding")])
    levels = 2 ** options.get("bits", 1) - 1
    assert fired.equal(fired.round())
    assert fired.max() == levels
    assert fired.min() == (-levels if options.get("signed") else 0)
    with torch.no_grad():
        state, parts = None, []
        for piece in tokens.split(13, dim=1):
            logits, state = model(piece, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_learnt_constants_start_as_the_numbers_and_reach_the_kernel():
    plain = NeuronConfig(tau=3.0, v_threshold=0.7)
    learned = plain.model_copy(update={"learn_tau": True, "learn_threshold": True})
    model = SpikeGPT(make_config("spikegpt-driven", neuron=learned))
    tau, threshold = model.head_neuron.constants()
    assert tau.tolist() == pytest.approx([3.0] * 33, rel=1e-6)
    assert threshold.tolist() == pytest.approx([0.7] * 33, rel=1e-6)
    neuron = LIF(learned, 2)
    with torch.no_grad():
        neuron.tau_logit.copy_(torch.tensor([0.0, -math.log(4.0)]))
        neuron.log_threshold.copy_(torch.tensor([0.0, math.log(0.5)]))
    x = torch.randn(1, 40, 2, generator=torch.Generator().manual_seed(0)) * 2
    fired, end = neuron(x, None, None)
    for c, (constant, level) in enumerate([(2.0, 1.0), (5.0, 0.5)]):
        wanted, last = lif(x[..., c : c + 1], tau=constant, v_threshold=level, backend="reference")
        assert torch.equal(fired[..., c : c + 1], wanted)
        torch.testing.assert_close(end[:, c : c + 1], last)
    assert 0 < fired.mean() < 1


def test_normalised_currents_do_not_depend_on_the_size_of_what_arrives():
    neuron = LIF(NeuronConfig(normalise_current=True), 50)
    x = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0))
    small, _ = neuron(0.05 * x, None, None)
    large, _ = neuron(20 * x, None, None)
    assert small.mean() > 0.02
    assert (small != large).float().mean() < 0.002
    assert LIF(NeuronConfig(), 50)(0.05 * x, None, None)[0].sum() == 0


def test_firing_rates_of_graded_spikes_count_spikes_and_not_their_size():
    neuron = LIF(NeuronConfig(bits=3, v_threshold=0.25), 1)
    neuron.monitor = True
    neuron(torch.tensor([2.0, 0.0, 0.0, 2.0]).view(1, 4, 1), None, None)
    assert neuron.firing_rate == 0.5


@pytest.mark.parametrize("variant", SPIKING)
def test_the_planner_counts_what_neurons_learn(variant):
    config = make_config(variant, neuron=NeuronConfig(learn_tau=True, learn_threshold=True))
    plain = make_config(variant)
    assert count(config) == SpikeGPT(config).count_parameters() > count(plain)
    assert SpikeGPT(plain).count_parameters() == count(plain)


def test_the_native_decoder_says_that_it_lacks_them():
    for options in OPTIONS.values():
        model = make_model("spikegpt", neuron=NeuronConfig(**options))
        assert "neurons" in obstacle_to_decoding(model)
    assert obstacle_to_decoding(make_model("spikegpt", neuron=NeuronConfig(tau=3.0))) == ""


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValidationError, match="learn_tau needs tau > 1"):
        NeuronConfig(tau=1.0, learn_tau=True)
    with pytest.raises(ValidationError, match=r"no membranes, for which neuron\.signed"):
        ModelConfig(variant="heaviside-rwkv", neuron=NeuronConfig(signed=True))
    run = {"data": {"path": "x"}, "parallel": {"tensor": 2}}
    for options in ({"learn_tau": True}, {"normalise_current": True}):
        with pytest.raises(ValidationError, match=r"does not work with model\.neuron"):
            RunConfig.model_validate({**run, "model": {"neuron": options}})
