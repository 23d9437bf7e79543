"""The neurons and projections of `spikegpt-driven` as a graph of NIR (Pedersen et al. 2024).

NIR knows linear maps and neurons. It has no node for what lies between them in SpikeGPT: LayerNorm, token
shift, WKV, relu^2, gates, the sum of the residual stream. So the graph falls into parts, without edges from
one to another: for each projection, under its name in the model,

    NAME.input (currents) -> NAME.neuron (LIF) -> NAME.projection (Linear) -> NAME.output

A host computes the rest, from the file of the remaining weights that is written beside the graph: for each
token it hands a part its currents and takes back the projection of its spikes.
"""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikescale.config import ModelConfig
from spikescale.errors import UserError

if TYPE_CHECKING:
    import nir

    from spikescale.model import SpikeGPT
    from spikescale.model.neuron import LIF

STEP = 1e-4  # seconds that stand for a token; what most simulators take a step to be
PARTS = ("input", "neuron", "projection", "output")


def projections(config: ModelConfig) -> list[str]:
    """Names in the model of all projections that read spikes."""
    time = [f"time_mix.{key}" for key in ("key", "value", "receptance", "output")]
    channel = [f"channel_mix.{key}" for key in ("key", "receptance", "value")]
    names = [f"blocks.{layer}.{name}" for layer in range(config.layers) for name in (*time, *channel)]
    return [*names, "head"]


def neuron_of(name: str) -> str:
    """The name in the model of the neuron before the projection `name`."""
    owner, _, key = name.rpartition(".")
    return f"{owner}.neurons.{key}" if owner else "head_neuron"


def to_nir(model: "SpikeGPT", step: float = STEP) -> "nir.NIRGraph":
    """The graph of a model, whose constants are in seconds with `step` to a token.

    A LIF of NIR is tau dv/dt = v_leak - v + r i. With Euler's steps, r = 1 and v_leak = v_reset that is ours:
    h = v + (x - (v - v_reset)) / tau. Raises UserError for a model whose neurons NIR cannot express.
    """
    import nir
    import numpy as np

    refuse_inexpressible(model.config)
    nodes: dict[str, Any] = {}
    edges: list[tuple[str, str]] = []
    for name in projections(model.config):
        neuron: LIF = model.get_submodule(neuron_of(name))  # type: ignore[assignment]
        weight = model.get_submodule(name).get_parameter("weight").detach().cpu().float().numpy()
        width = weight.shape[1]
        tau, threshold = (
            np.broadcast_to(
                torch.as_tensor(value, dtype=torch.float64).detach().cpu().numpy(), (width,)
            ).copy()
            for value in neuron.constants()
        )
        reset = np.full(width, neuron.config.v_reset)
        lif = nir.LIF(tau * step, np.ones(width), reset, threshold, reset.copy())
        inner = (nir.Input(np.array([width])), lif, nir.Linear(weight), nir.Output(np.array([len(weight)])))
        names = [f"{name}.{part}" for part in PARTS]
        nodes.update(zip(names, inner, strict=True))
        edges += itertools.pairwise(names)
    return nir.NIRGraph(nodes, edges, metadata={"step": step})


def part(graph: "nir.NIRGraph", name: str) -> "nir.NIRGraph":
    """The part of `graph` for the projection `name` alone, its nodes called as in PARTS: for a simulator.

    Raises KeyError for a name that the graph has not.
    """
    import nir

    nodes = {key: graph.nodes[f"{name}.{key}"] for key in PARTS}
    return nir.NIRGraph(nodes, list(itertools.pairwise(PARTS)))


def refuse_inexpressible(config: ModelConfig) -> None:
    """Raise UserError for a model whose neurons are not before projections, or are none of NIR's."""
    if config.variant != "spikegpt-driven":
        raise UserError(
            f"--format nir: the variant is {config.variant}; only spikegpt-driven's projections read spikes"
        )
    neuron = config.neuron
    for key, why in (
        ("soft_reset", "resets to a value, and does not subtract the threshold"),
        ("signed", "has no spikes below 0"),
        ("normalise_current", "cannot divide currents by their size"),
    ):
        if getattr(neuron, key):
            raise UserError(f"--format nir: neuron.{key} is true; NIR's LIF {why}")
    if neuron.bits > 1:
        raise UserError(f"--format nir: neuron.bits is {neuron.bits}; NIR's LIF has spikes of 0 and 1")


def write_nir(file: Path, graph: "nir.NIRGraph") -> None:
    """Write a graph as NIR's HDF5 file."""
    import nir

    nir.write(str(file), graph)


def read_nir(file: Path) -> "nir.NIRGraph":
    """Read what `write_nir` wrote. Raises UserError for a file that is no such graph."""
    import nir

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        graph = nir.read(str(file))
    except (OSError, KeyError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{file}: not a NIR file ({' '.join(str(error).split())})") from None
    names = {name.rpartition(".")[0] for name in graph.nodes}
    for name in sorted(names):
        if missing := [key for key in PARTS if f"{name}.{key}" not in graph.nodes]:
            raise UserError(f"{file}: {name} has no {missing[0]}; it is no graph of spikescale's")
    return graph
