"""The driven variant as a NIR graph: read back, other simulators' neurons fire where ours do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from interop_cases import random_model, tiny

from spikescale.cli.main import main
from spikescale.errors import UserError
from spikescale.interop.nir_graph import PARTS, part, projections, read_nir, to_nir
from spikescale.interop.nir_simulate import cosimulate, host_model

nir = pytest.importorskip("nir")

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exported(tmp_path, saved):
    neuron = {"v_threshold": 0.25}
    model, folder = saved(tiny("spikegpt-driven", layers=2, binary_embedding=True, neuron=neuron))
    assert main(["export", str(folder), str(tmp_path / "nir"), "--format", "nir"]) == 0
    return model, tmp_path / "nir"


@pytest.mark.parametrize("simulator", ["spikingjelly", "snntorch"])
@torch.no_grad()
def test_another_simulator_fires_the_same_spikes_and_the_host_gets_the_same_logits(exported, simulator):
    pytest.importorskip(simulator)
    model, folder = exported
    host = host_model(folder)
    assert host.head.weight.isnan().all() and host.blocks[1].channel_mix.key.weight.isnan().all()
    logits, agreements = cosimulate(host, read_nir(folder / "model.nir"), TOKENS, simulator)
    assert sorted(entry.name for entry in agreements) == sorted(projections(model.config))
    assert [entry for entry in agreements if entry.differing] == []
    rates = [entry.spikes / entry.neurons for entry in agreements]
    assert min(rates) > 0.01 and max(rates) < 0.9
    torch.testing.assert_close(logits, model(TOKENS)[0], rtol=1e-5, atol=1e-5)


def test_a_neuron_that_differs_is_noticed(exported):
    pytest.importorskip("spikingjelly")
    _, folder = exported
    graph = read_nir(folder / "model.nir")
    graph.nodes["blocks.1.time_mix.value.neuron"].v_threshold += 0.01
    _, agreements = cosimulate(host_model(folder), graph, TOKENS, "spikingjelly")
    assert {entry.name for entry in agreements if entry.differing} == {"blocks.1.time_mix.value"}


def test_the_graph_holds_neurons_and_projections_in_nirs_units(exported):
    model, folder = exported
    graph = read_nir(folder / "model.nir")
    assert len(graph.nodes) == 4 * len(projections(model.config)) == 4 * 15
    assert len(graph.edges) == 3 * 15
    name = "blocks.0.channel_mix.value"
    neuron, projection = (graph.nodes[f"{name}.{key}"] for key in ("neuron", "projection"))
    assert np.array_equal(projection.weight, model.blocks[0].channel_mix.value.weight.detach().numpy())
    assert neuron.tau.shape == (96,) and np.all(neuron.tau == 2e-4) and np.all(neuron.r == 1)
    assert np.all(neuron.v_threshold == 0.25) and np.all(neuron.v_leak == 0) and np.all(neuron.v_reset == 0)
    alone = part(graph, name)
    assert tuple(alone.nodes) == PARTS and len(alone.edges) == 3


def test_constants_that_are_learnt_are_written_channel_by_channel():
    config = tiny("spikegpt-driven", layers=1, neuron={"learn_tau": True, "learn_threshold": True})
    model = random_model(config)
    neuron = to_nir(model).nodes["blocks.0.time_mix.key.neuron"]
    tau, threshold = model.blocks[0].time_mix.neurons["key"].constants()
    assert np.unique(neuron.tau).size == 24
    np.testing.assert_allclose(neuron.tau, tau.detach().numpy() * 1e-4, rtol=1e-6)
    np.testing.assert_allclose(neuron.v_threshold, threshold.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("variant", "neuron", "complaint"),
    [
        ("spikegpt", {}, "the variant is spikegpt; only spikegpt-driven's projections read spikes"),
        ("spikegpt-driven", {"soft_reset": True}, "neuron.soft_reset is true; NIR's LIF resets to a value"),
        ("spikegpt-driven", {"signed": True}, "neuron.signed is true"),
        ("spikegpt-driven", {"normalise_current": True}, "neuron.normalise_current is true"),
        ("spikegpt-driven", {"bits": 2}, "neuron.bits is 2; NIR's LIF has spikes of 0 and 1"),
    ],
)
def test_what_nir_cannot_express_is_refused(tmp_path, saved, capsys, variant, neuron, complaint):
    _, folder = saved(tiny(variant, layers=1, neuron=neuron))
    assert main(["export", str(folder), str(tmp_path / "nir"), "--format", "nir"]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "nir").exists()


def test_files_that_are_no_such_graph_are_refused(tmp_path, exported):
    _, folder = exported
    (tmp_path / "text.nir").write_text("graph")
    nir.write(str(tmp_path / "other.nir"), nir.NIRGraph.from_list(nir.Linear(np.ones((2, 2)))))
    for name, complaint in (
        ("nowhere.nir", "no such file"),
        ("text.nir", "not a NIR file"),
        ("other.nir", "no graph of spikescale's"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_nir(tmp_path / name)
    graph = read_nir(folder / "model.nir")
    with pytest.raises(UserError, match="must be spikingjelly or snntorch"):
        cosimulate(host_model(folder), graph, TOKENS, "brian")  # type: ignore[arg-type]
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    settings = json.loads((broken / "spikescale.json").read_text())
    settings["config"]["width"] = 25
    (broken / "spikescale.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"host.safetensors: lacks tensor embedding.weight, or"):
        host_model(broken)
