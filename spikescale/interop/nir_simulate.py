"""A model whose neurons and projections run in somebody else's simulator, from a NIR graph.

The host computes what NIR has no nodes for, with spikescale's own modules. Their neurons and projections are
not used: the simulator's spikes and outputs take the place of theirs.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from spikescale import files
from spikescale.config import ModelConfig
from spikescale.errors import UserError
from spikescale.interop.nir_graph import neuron_of, part, projections
from spikescale.tensor_shards import open_stored

if TYPE_CHECKING:
    import nir

    from spikescale.model import SpikeGPT

Simulator = Literal["spikingjelly", "snntorch"]
GRAPH, HOST, SETTINGS = "model.nir", "host.safetensors", "spikescale.json"


@dataclass(frozen=True)
class Agreement:
    """How one part in the simulator compares with spikescale's neuron and projection, on the same currents.

    Attributes:
        name: the projection's.
        neurons: times tokens: how often there could have been a spike.
        spikes: how many there were.
        differing: how many neurons and tokens only one of the two fired at.
    """

    name: str
    neurons: int
    spikes: int
    differing: int


def host_model(folder: Path) -> "SpikeGPT":
    """The model of a folder written by `export_nir`, in evaluation mode, without its projections.

    Those are NaN: they are in the graph. Raises UserError for a folder that is none.
    """
    from spikescale.model import SpikeGPT

    described = files.read_json(folder / SETTINGS)
    config = ModelConfig.model_validate(described["config"])
    with torch.device("meta"):
        model = SpikeGPT(config)
    model = model.to_empty(device="cpu")
    in_graph = {f"{name}.weight" for name in projections(config)}
    with open_stored(folder / HOST) as stored, torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in in_graph:
                parameter.fill_(torch.nan)
            elif name in stored.names() and stored.shape(name) == tuple(parameter.shape):
                parameter.copy_(stored.get(name))
            else:
                raise UserError(f"{folder / HOST}: lacks tensor {name}, or has it in another shape")
    return model.eval()


@torch.no_grad()
def cosimulate(
    host: "SpikeGPT", graph: "nir.NIRGraph", tokens: Tensor, simulator: Simulator
) -> tuple[Tensor, list[Agreement]]:
    """Logits (B, T, V) for tokens (B, T), all neurons and projections simulated, and how the neurons agree.

    Each part is stepped token by token in `simulator`, one of SpikingJelly and snnTorch, from its first
    state. Raises UserError for another simulator, ImportError where it is not installed, and whatever it
    raises for parameters that it does not take (both want one tau and one threshold for all of a part).
    """
    outputs: dict[str, Tensor] = {}
    agreements: list[Agreement] = []
    handles = []

    def watch(name: str) -> None:
        simulated = _simulated(part(graph, name), simulator, float(graph.metadata["step"]))

        def fire(module: nn.Module, inputs: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> Any:
            spikes, outputs[name] = simulated(inputs[0])
            mine, v = result
            differing = int((mine != spikes).sum())
            agreements.append(Agreement(name, mine.numel(), int(spikes.sum()), differing))
            return spikes, v

        def project(module: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> Tensor:
            return outputs.pop(name)

        handles.append(host.get_submodule(neuron_of(name)).register_forward_hook(fire))
        handles.append(host.get_submodule(name).register_forward_hook(project))

    try:
        for name in projections(host.config):
            watch(name)
        logits, _ = host(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return logits, agreements


def _simulated(
    graph: "nir.NIRGraph", simulator: str, step: float
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """From currents (B, T, C) to spikes (B, T, C) and outputs (B, T, D), by another program."""
    if simulator == "spikingjelly":
        from spikingjelly.activation_based.nir_exchange import import_from_nir

        network = import_from_nir(graph, dt=step)
    elif simulator == "snntorch":
        from snntorch.import_nir import import_from_nir

        if step != 1e-4:
            raise UserError(f"simulator snntorch: takes a step to be 1e-4 s, and the graph's is {step:g}")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
            network = import_from_nir(graph)
    else:
        raise UserError(f"simulator {simulator!r}: must be spikingjelly or snntorch")
    fired: list[Tensor] = []
    network.get_submodule("neuron").register_forward_hook(
        lambda module, inputs, result: fired.append(result[0] if isinstance(result, tuple) else result)
    )

    def run(currents: Tensor) -> tuple[Tensor, Tensor]:
        fired.clear()
        state, out = None, []
        for current in currents.unbind(1):
            projected, state = network(current, state)
            out.append(projected)
        return torch.stack(fired, 1).to(currents.dtype), torch.stack(out, 1)

    return run
