"""Operations counted while a model runs are those that can be counted by hand."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spikescale.config import ModelConfig, NeuronConfig
from spikescale.energy import Count, count_operations
from spikescale.energy.count import Arrived
from spikescale.errors import UserError
from spikescale.model import SpikeGPT

VARIANTS = ("rwkv", "heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven")
C, V, L, N = 8, 20, 2, 50  # width, symbols, layers, tokens
INNER = 4 * C


def make_model(variant="spikegpt", **neuron):
    config = ModelConfig(
        variant=variant,
        layers=L,
        width=C,
        vocab_size=V,
        binary_embedding=variant != "rwkv",
        neuron=NeuronConfig(**{"v_threshold": 0.4, **neuron}) if "rwkv" not in variant else NeuronConfig(),
    )
    model = SpikeGPT(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def some_tokens():
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))


def inputs_of_projections(model, tokens):
    """What arrives at each Linear, read by hooks of this test's own; one call over the whole text."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0].detach()))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    spikes = {}
    hooks += [
        module.register_forward_hook(lambda _, __, out, name=name: spikes.__setitem__(name, out[0].detach()))
        for name, module in model.neurons()
    ]
    model(tokens[None])
    for hook in hooks:
        hook.remove()
    return seen, spikes


def counted(model, tokens=None, length=N):
    tokens = some_tokens() if tokens is None else tokens
    return {part.name: part for part in count_operations(model, tokens, context_length=length)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_projections_multiply_floats_and_accumulate_spikes(variant):
    model, tokens = make_model(variant), some_tokens()
    parts, (seen, _) = counted(model), inputs_of_projections(model, tokens)
    assert len(seen) == 7 * L + 1
    reading_spikes = {
        "rwkv": set(),
        "heaviside-rwkv": set(),
        "spikegpt": set(),
        "spikegpt-b": {f"blocks.{i}.channel_mix.value" for i in range(L)},
        "spikegpt-driven": set(seen),
    }[variant]
    for name, x in seen.items():
        outputs, inputs = model.get_submodule(name).weight.shape
        if name in reading_spikes:
            wanted = Count(ac=float(x.sum()) * outputs / N)  # a spike is 1: their sum is their number
            assert parts[name].reads == "spikes"
        else:
            wanted = Count(mac=inputs * outputs)
            assert parts[name].reads == "floats"
        assert parts[name].count == pytest.approx(wanted), name
        assert parts[name].dense == inputs * outputs
    # Something must have fired, or the counts say nothing.
    assert all(parts[name].count.ac > 0 for name in reading_spikes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_other_work_is_that_of_the_definitions(variant):
    model = make_model(variant)
    parts, (_, spikes) = counted(model), inputs_of_projections(model, some_tokens())
    norm = Count(multiply=3 * C, add=4 * C, special=1)
    expected = {"embedding": Count(lookup=C), "ln_out": norm, "blocks.0.ln0": norm}
    if variant != "rwkv":
        expected["embedding.neuron"] = Count(add=C)
    if variant not in ("rwkv", "spikegpt-driven"):
        expected["blocks.0.grid"] = Count(add=2 * C)
    lif = Count(multiply=1, add=3)
    if variant == "spikegpt-driven":
        expected["head_neuron"] = lif * C
    for i in range(L):
        block = f"blocks.{i}"
        expected |= {
            f"{block}.ln1": norm,
            f"{block}.ln2": norm,
            f"{block}.time_mix.mix": Count(multiply=3 * C, add=4 * C),
            f"{block}.time_mix.wkv": Count(multiply=6 * C, add=12 * C, special=5 * C),
            f"{block}.time_mix.gate": Count(multiply=C, add=C, special=2 * C),
            f"{block}.channel_mix.mix": Count(multiply=2 * C, add=3 * C),
            f"{block}.channel_mix.gate": Count(multiply=C, add=C, special=2 * C),
        }
        for place in ("time_neuron", "channel_neuron"):
            name = f"{block}.{place}"
            if variant == "heaviside-rwkv":
                expected[name] = Count(add=C)
            elif variant.startswith("spikegpt") and variant != "spikegpt-driven":
                expected[name] = lif * C
            # A spike is added where there is one; floats are added everywhere.
            added = float(spikes[name].sum()) / N if name in spikes else C
            expected[f"{name}.sum"] = Count(add=added)
        if variant == "spikegpt-b":
            expected[f"{block}.channel_mix.neurons.activation"] = lif * INNER
        else:
            expected[f"{block}.channel_mix.squared_relu"] = Count(multiply=INNER, add=INNER)
        if variant == "spikegpt-driven":
            for mix, keys in (
                ("time_mix", ("key", "value", "receptance", "output")),
                ("channel_mix", ("key", "receptance", "value")),
            ):
                for key in keys:
                    width = INNER if (mix, key) == ("channel_mix", "value") else C
                    expected[f"{block}.{mix}.neurons.{key}"] = lif * width
    others = {name: part.count for name, part in parts.items() if not part.dense}
    assert others.keys() == expected.keys()
    for name, wanted in expected.items():
        assert others[name] == pytest.approx(wanted), name


def test_the_dense_multiplications_are_those_that_torch_counts():
    model, tokens = make_model("rwkv"), some_tokens()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(tokens[None])
    macs = sum(part.count.mac for part in counted(model).values())
    assert macs * N * 2 == flops.get_total_flops() > 0


@pytest.mark.parametrize("variant", ["spikegpt", "spikegpt-driven"])
def test_counts_do_not_depend_on_how_the_text_is_cut_up(variant):
    model, tokens = make_model(variant), some_tokens()
    whole = count_operations(model, tokens, context_length=10, batch_size=1)
    together = count_operations(model, tokens, context_length=10, batch_size=4)
    for one, other in zip(whole, together, strict=True):
        assert one.count == pytest.approx(other.count), one.name
    # The last window is shorter: no token is lost.
    seen = []
    count_operations(model, tokens, context_length=15, batch_size=2, progress=seen.append)
    assert seen == [30, 15, 5]


def test_graded_and_signed_spikes_are_priced_by_their_bits():
    model = make_model("spikegpt-driven", bits=2, v_threshold=0.15)
    parts, (seen, _) = counted(model), inputs_of_projections(model, some_tokens())
    assert Counter(part.reads for part in parts.values() if part.dense)["graded spikes (2 bits)"] >= 10
    for name, x in seen.items():
        bits = 2 if x.max() > 1 else 1
        wanted = bits * float(x.count_nonzero()) * model.get_submodule(name).weight.shape[0] / N
        assert parts[name].count.ac == pytest.approx(wanted)
    signed = counted(make_model("spikegpt-driven", signed=True))
    assert signed["blocks.0.time_mix.key"].reads == "signed spikes"
    assert signed["blocks.0.time_mix.key"].bits == 1
    assert signed["blocks.0.time_mix.neurons.key"].count.add == pytest.approx(4 * C)  # two comparisons


def test_a_soft_reset_subtracts_at_each_spike_and_normalised_currents_cost():
    soft = counted(make_model("spikegpt-driven", soft_reset=True))["head_neuron"]
    assert 0 < soft.rate < 1
    assert soft.count == pytest.approx(Count(multiply=1, add=3 + soft.rate) * C)
    normalised = counted(make_model("spikegpt-driven", normalise_current=True))["head_neuron"]
    assert normalised.count == pytest.approx(Count(multiply=3, add=4) * C + Count(special=1))


@pytest.mark.parametrize(
    ("values", "bits"), [([0, 1], 1), ([0, 0], 1), ([0, -1, 1], 1), ([0, 3], 2), ([0.5, 1], 0), ([256], 0)]
)
def test_what_counts_as_spikes(values, bits):
    arrived = Arrived()
    arrived.take(torch.tensor(values, dtype=torch.float32))
    assert arrived.bits == bits


def test_what_has_no_rule_or_no_meaning_is_refused():
    model = make_model()
    with pytest.raises(UserError, match="the text is empty"):
        count_operations(model, torch.empty(0, dtype=torch.long), context_length=4)
    broken = make_model()
    with torch.no_grad():
        broken.ln_out.weight[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        counted(broken)
    model.blocks[0].time_mix.key = torch.nn.Sequential(model.blocks[0].time_mix.key)
    with pytest.raises(UserError, match=r"blocks\.0\.time_mix\.key: Sequential has no energy rule"):
        counted(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
