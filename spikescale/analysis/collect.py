"""A model reads a text, and statistics of every neuron are taken from its own calls."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikescale.analysis.membrane import membranes
from spikescale.analysis.statistics import LayerStatistics, threshold_of
from spikescale.errors import UserError
from spikescale.inference.reading import batches
from spikescale.model.neuron import LIF, Neuron
from spikescale.model.spikegpt import SpikeGPT

# Whose neurons they are: those in TimeMix (SRWKV in the paper) and after it, or in ChannelMix (SRFFN) and
# after.
_SUBBLOCK = re.compile(r"blocks\.(\d+)\.(time|channel)_(mix|neuron)")


@dataclass(frozen=True)
class Analysis:
    """What was found: the layers in order of computation, and the tokens that were read."""

    layers: list[LayerStatistics]
    tokens: int

    def subblocks(self) -> dict[str, list[float | None]]:
        """Mean firing rates of each block's neurons in and after TimeMix (SRWKV) and ChannelMix (SRFFN)."""
        spikes: dict[tuple[int, str], list[LayerStatistics]] = {}
        for layer in self.layers:
            if match := _SUBBLOCK.match(layer.name):
                kind = {"time": "SRWKV", "channel": "SRFFN"}[match[2]]
                spikes.setdefault((int(match[1]), kind), []).append(layer)
        blocks = 1 + max((index for index, _ in spikes), default=-1)
        return {
            kind: [_pooled_rate(spikes.get((index, kind), [])) for index in range(blocks)]
            for kind in ("SRWKV", "SRFFN")
        }


def _pooled_rate(layers: list[LayerStatistics]) -> float | None:
    neurons = sum(layer.channels for layer in layers)
    return sum(float(layer.rates.sum()) for layer in layers) / neurons if neurons else None


class Collector:
    """Hooks on a model's neurons, which take statistics of each of their calls."""

    def __init__(self, model: SpikeGPT) -> None:
        self.neurons = model.neurons()
        self.found: dict[str, LayerStatistics] = {}

    def __enter__(self) -> "Collector":
        # A neuron that something hangs on is not fused with what follows.
        self._hooks = [
            neuron.register_forward_hook(
                lambda module, arguments, output, name=name: self._take(name, module, arguments, output)
            )
            for name, neuron in self.neurons
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _take(self, name: str, neuron: Neuron, arguments: tuple[Any, ...], output: tuple[Any, Any]) -> None:
        (x, v, reset), (spikes, _) = arguments, output
        h = membranes(neuron, x, v, reset, spikes)[0] if isinstance(neuron, LIF) else x.float()
        if not bool(h.isfinite().all()):
            raise UserError(f"{name}: the membranes are not finite: what the model computes has no meaning")
        if name not in self.found:
            width = x.shape[-1]
            self.found[name] = LayerStatistics(name, width, threshold_of(neuron, width))
        self.found[name].take(spikes, h)


@torch.no_grad()
def analyse(
    model: SpikeGPT,
    tokens: Tensor,
    *,
    context_length: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Analysis:
    """Statistics of every neuron while the model reads `tokens` (N,), int64.

    The text is read in windows of `context_length` tokens, each from an empty state, `batch_size` at a time;
    memory does not depend on N. `progress` is called with the number of tokens newly read. Raises UserError
    for a model without neurons and for an empty text.
    """
    if not model.neurons():
        raise UserError(f"variant {model.config.variant} has no neurons: there is nothing to analyse")
    if not len(tokens):
        raise UserError("the text is empty: there is nothing to analyse")
    device = next(model.parameters()).device
    with Collector(model) as collector:
        for windows in batches(tokens, context_length, batch_size):
            model(windows.to(device))
            if progress is not None:
                progress(windows.numel())
    names = [name for name, _ in collector.neurons]
    return Analysis([collector.found[name] for name in sorted(names, key=_place)], len(tokens))


def _place(name: str) -> tuple[int, int, str]:
    """Sorts neurons in the order of computation: embedding, blocks, head."""
    match = _SUBBLOCK.match(name)
    if match is None:
        return (-1 if name.startswith("embedding") else 1_000_000, 0, "")
    part = {"time_mix": 0, "time_neuron": 1, "channel_mix": 2, "channel_neuron": 3}[f"{match[2]}_{match[3]}"]
    return int(match[1]), part, ""
