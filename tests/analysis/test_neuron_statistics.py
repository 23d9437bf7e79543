"""Statistics taken piece by piece are those of the whole, computed at once."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from spikescale.analysis import LayerStatistics, analyse
from spikescale.analysis.collect import Collector
from spikescale.analysis.membrane import membranes
from spikescale.analysis.statistics import BINS, DETAIL_TOKENS, LONGEST_INTERVAL, RANGE
from spikescale.cli.main import main
from spikescale.config import ModelConfig, NeuronConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.errors import UserError
from spikescale.kernels.lif import graded_lif, lif
from spikescale.model import SpikeGPT
from spikescale.model.neuron import LIF
from spikescale.model.store import save_model_folder

C = 5


def some_activity(windows=6, length=150):
    generator = torch.Generator().manual_seed(0)
    membrane = torch.randn(windows, length, C, generator=generator) * torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0])
    membrane[2, 7, 1] = 40.0  # an outlier
    return (membrane >= 1.0).float(), membrane


def taken(spikes, membrane, pieces=(1, 3, 2)):
    layer = LayerStatistics("layer", C, np.full(C, 1.0))
    for s, h in zip(spikes.split(pieces), membrane.split(pieces), strict=True):
        layer.take(s, h)
    return layer


def test_rates_moments_and_histograms_are_those_of_the_whole():
    spikes, membrane = some_activity()
    layer = taken(spikes, membrane)
    h = membrane.double().numpy().reshape(-1, C)
    assert layer.tokens == 900
    np.testing.assert_allclose(layer.rates, spikes.double().numpy().mean((0, 1)))
    np.testing.assert_allclose(layer.mean, h.mean(0), atol=1e-12)
    np.testing.assert_allclose(layer.deviation, h.std(0), rtol=1e-12)
    inner, _ = np.histogram(h, bins=BINS, range=(-RANGE, RANGE))
    # numpy counts the last edge into the last bin; nothing lies exactly there.
    assert layer.histogram[1:-1].tolist() == inner.tolist()
    assert layer.histogram[0] == (h < -RANGE).sum()
    assert layer.histogram[-1] == (h >= RANGE).sum() > 0
    assert (layer.lowest, layer.largest) == (h.min(), 40.0)


def test_intervals_are_those_found_one_by_one():
    spikes, membrane = some_activity()
    spikes[0, :, 0] = 0
    spikes[0, [3, 140], 0] = 1  # 137 tokens apart: counted as longer
    layer = taken(spikes, membrane)
    found = [[] for _ in range(C)]
    for window in spikes.numpy():
        for c in range(C):
            when = [t for t in range(len(window)) if window[t, c]]
            found[c] += [b - a for a, b in itertools.pairwise(when)]
    everything = list(itertools.chain(*found))
    counts = [sum(i == length for i in everything) for length in range(1, LONGEST_INTERVAL + 1)]
    assert layer.intervals.tolist() == [*counts, sum(i > LONGEST_INTERVAL for i in everything)]
    assert layer.intervals[-1] > 0
    assert layer.mean_interval == pytest.approx(np.mean(everything))
    each = [np.std(i) / np.mean(i) for i in found if len(i) >= 2]
    assert layer.interval_variation == pytest.approx(np.mean(each))


def test_dead_saturated_and_outlying():
    spikes, membrane = some_activity()
    spikes[..., 0], spikes[..., 4] = 0, 1
    layer = taken(spikes, membrane)
    assert layer.dead(0.0).tolist() == [True, False, False, False, False]
    assert layer.saturated(0.95).tolist() == [False, False, False, False, True]
    h = membrane.double().numpy()
    outliers = 0
    for start, end in ((0, 1), (1, 4), (4, 6)):
        known = h[: start or 1]
        outliers += (abs(h[start:end] - known.mean((0, 1))) > 6 * known.std((0, 1))).sum()
    assert layer.outliers == outliers >= 1
    silent = LayerStatistics("silent", C, np.ones(C))
    silent.take(torch.zeros(1, 9, C), torch.zeros(1, 9, C))
    assert silent.mean_interval is None
    assert silent.interval_variation is None


def test_what_is_kept_does_not_grow_with_the_text():
    layer = LayerStatistics("layer", C, np.ones(C))
    sizes = set()
    for _ in range(4):
        layer.take(*some_activity(3, 300))
        arrays = [value for value in vars(layer).values() if isinstance(value, np.ndarray)]
        sizes.add(sum(array.nbytes for array in arrays) + layer.detail.membranes.nbytes)
    assert len(sizes) == 1
    assert layer.detail.spikes.shape == (DETAIL_TOKENS, C)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"soft_reset": True},
        {"v_reset": -0.2, "tau": 3.0},
        {"signed": True, "bits": 2, "normalise_current": True},
        {"learn_tau": True, "learn_threshold": True},
    ],
    ids=str,
)
def test_membranes_cross_the_threshold_at_the_spikes_and_end_where_the_kernel_ends(options):
    neuron = LIF(NeuronConfig(v_threshold=0.5, **options), 9)
    with torch.no_grad():
        for parameter in neuron.parameters():
            parameter.copy_(torch.linspace(-0.5, 0.5, 9))
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 60, 9, generator=generator) * 2, torch.randn(2, 9, generator=generator)
    reset = torch.rand(2, 60, generator=generator) < 0.1
    with torch.no_grad():
        spikes, end = neuron(x, v, reset)
        h, last = membranes(neuron, x, v, reset, spikes)
        _, threshold = neuron.constants()
    assert torch.equal(last, end)
    crossed = h > threshold if options.get("soft_reset") else h >= threshold
    if options.get("signed"):
        crossed |= -h >= threshold
    assert torch.equal(crossed, spikes != 0)
    assert 0.02 < crossed.float().mean() < 0.98


def make_model(variant, **neuron):
    config = ModelConfig(
        variant=variant, layers=2, width=16, vocab_size=256, neuron=NeuronConfig(**neuron), context_length=32
    )
    model = SpikeGPT(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("variant", ["heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven"])
def test_a_model_is_watched_without_being_changed(variant):
    model = make_model(variant, v_threshold=0.5)
    tokens = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before, _ = model(tokens[None, :32])
    found = analyse(model, tokens, context_length=32, batch_size=2)
    with torch.no_grad():
        after, _ = model(tokens[None, :32])
    assert torch.equal(before, after)
    assert not any(module._forward_hooks for module in model.modules())
    # The monitors of training say the same, window by window.
    spikes = {name: 0.0 for name, _ in model.neurons()}
    for _, neuron in model.neurons():
        neuron.monitor = True
    for window in tokens.split(32):
        with torch.no_grad():
            model(window[None])
        for name, neuron in model.neurons():
            spikes[name] = spikes[name] + neuron.channel_rates.numpy() * len(window)
    assert {layer.name for layer in found.layers} == spikes.keys()
    for layer in found.layers:
        np.testing.assert_allclose(layer.spikes, spikes[layer.name], rtol=1e-5, atol=1e-5)
        assert layer.tokens == 100
    assert found.layers[0].name == "embedding.neuron"
    rates = found.subblocks()
    wanted = [layer for layer in found.layers if layer.name.startswith("blocks.1.time")]
    pooled = sum(layer.rates.sum() for layer in wanted) / sum(layer.channels for layer in wanted)
    assert rates["SRWKV"][1] == pytest.approx(pooled)
    assert len(rates["SRFFN"]) == 2


def test_models_without_neurons_and_numbers_that_are_none_are_refused():
    config = ModelConfig(variant="rwkv", binary_embedding=False, layers=1, width=8, vocab_size=9)
    with pytest.raises(UserError, match="variant rwkv has no neurons"):
        analyse(SpikeGPT(config), torch.zeros(4, dtype=torch.long), context_length=4)
    model = make_model("spikegpt")
    with torch.no_grad():
        model.blocks[0].time_mix.output.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"blocks\.0\.time_neuron: the membranes are not finite"):
        analyse(model, torch.zeros(4, dtype=torch.long), context_length=4)
    with pytest.raises(UserError, match="text is empty"):
        analyse(model, torch.zeros(0, dtype=torch.long), context_length=4)


def test_the_command_writes_a_page_that_stands_alone(tmp_path, capsys):
    model = make_model("spikegpt", v_threshold=0.5)
    save_model_folder(tmp_path / "a<b>", model.state_dict(), model.config, make_tokenizer("byte"), {})
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 6)
    words = ["analyze", str(tmp_path / "a<b>"), "--text", str(tmp_path / "text.txt")]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    written = [line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines()]
    assert len(written) == 9
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert "a&lt;b&gt;" in page
    assert "a<b>" not in page
    assert page.count("data:image/png;base64,") == 7
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    numbers = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert numbers["tokens"] == 6 * 43 + 1
    assert len(numbers["layers"]["blocks.0.time_neuron"]["firing_rate_of_neurons"]) == 16
    assert main([*words, "--output", str(tmp_path / "out"), "--dead-rate", "2"]) == 2
    assert "must be from 0 to 1" in capsys.readouterr().err


def test_the_collector_keeps_graded_spikes_as_they_are():
    model = make_model("spikegpt-driven", bits=2, v_threshold=0.2)
    with Collector(model) as collector, torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.long))
    assert max(layer.detail.spikes.max() for layer in collector.found.values()) == 3
    x = torch.full((1, 1, 1), 4.0)
    assert graded_lif(x, levels=3)[0].item() == 2
    assert lif(x)[0].item() == 1
