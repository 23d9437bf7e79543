"""Counting operations while a model runs: each module says what arrived at it, and a rule what that costs.

The rules count the operations of the definitions (kernels/*/reference.py), whichever backend runs. Whether a
projection multiplies or accumulates is decided by the values that arrived at it, not by the model's variant.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikescale.energy.operations import Count, Part
from spikescale.errors import UserError
from spikescale.inference.reading import batches
from spikescale.model.block import Block
from spikescale.model.channel_mix import EXPANSION, ChannelMix
from spikescale.model.embedding import Embedding
from spikescale.model.neuron import LIF, Heaviside, NoNeuron
from spikescale.model.norm import LayerNorm
from spikescale.model.spikegpt import SpikeGPT
from spikescale.model.time_mix import TimeMix

# An element's operations in the definitions.
SIGMOID = Count(add=1, special=2)  # an exponential and a division
GATE = SIGMOID + Count(multiply=1)
WKV = Count(multiply=6, add=12, special=5)  # four exponentials and a division; the two maxima are comparisons
SQUARED_RELU = Count(multiply=1, add=1)
NORM = Count(multiply=3, add=4)
NORM_TOKEN = Count(special=1)  # the root, once a token
DIFFERENCE = Count(add=1)  # of a token and the one before, once for all mixtures
MIXTURE = Count(multiply=1, add=1)
CONTAINERS = (SpikeGPT, nn.ModuleList, nn.ModuleDict)


@dataclass
class Arrived:
    """What has come into a module so far, or what it has given: of bounded size, whatever the text."""

    numbers: int = 0
    nonzero: int = 0
    whole: bool = True
    negative: bool = False
    largest: float = 0.0

    def take(self, x: Tensor) -> None:
        """Take in a tensor. Raises UserError for numbers that are none."""
        x = x.detach()
        if not bool(x.isfinite().all()):
            raise UserError("the model's activations are not finite: what it computes has no meaning")
        self.numbers += x.numel()
        self.nonzero += int(x.count_nonzero())
        self.whole = self.whole and bool((x == x.round()).all())
        self.negative = self.negative or bool((x < 0).any())
        self.largest = max(self.largest, float(x.abs().max()))

    @property
    def rate(self) -> float:
        """The share of numbers that are not 0."""
        return self.nonzero / self.numbers

    @property
    def bits(self) -> int:
        """Bits of the largest spike without its sign; 0: these are no spikes, but floats."""
        if not self.whole or self.largest > 255:
            return 0
        return max(1, int(self.largest).bit_length())


class Counter:
    """Hooks on the modules of a model, which take in what arrives there while it runs."""

    def __init__(self, model: SpikeGPT) -> None:
        self.model = model
        self.tokens = 0
        self.arrived: dict[str, Arrived] = {}
        self.elements: dict[str, int] = {}
        self._hooks: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator["Counter"]:
        """Count what runs within the block. Raises UserError for a module that no rule is known for."""
        try:
            for name, module in self.model.named_modules():
                self._watch(name, module)
            yield self
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    def _watch(self, name: str, module: nn.Module) -> None:
        if isinstance(module, CONTAINERS):
            return
        if isinstance(module, Embedding):
            self._before(module, lambda tokens: self._count_tokens(tokens))
        elif isinstance(module, nn.Linear):
            self._before(module, lambda x: self._take(name, x))
        elif isinstance(module, LIF | Heaviside | NoNeuron):
            # A neuron that something hangs on is not fused with what follows.
            self._hooks.append(module.register_forward_hook(lambda _, __, out: self._take(name, out[0])))
        elif isinstance(module, Block | TimeMix | ChannelMix | LayerNorm):
            self._before(module, lambda x: self._see(name, x))
        else:
            raise UserError(
                f"{name}: {type(module).__name__} has no energy rule; merge adapters into the weights first"
            )

    def _before(self, module: nn.Module, look: Callable[[Tensor], None]) -> None:
        self._hooks.append(module.register_forward_pre_hook(lambda _, arguments: look(arguments[0])))

    def _count_tokens(self, tokens: Tensor) -> None:
        self.tokens += tokens.numel()

    def _take(self, name: str, x: Tensor) -> None:
        self._see(name, x)
        self.arrived.setdefault(name, Arrived()).take(x)

    def _see(self, name: str, x: Tensor) -> None:
        self.elements[name] = self.elements.get(name, 0) + x.numel()

    def parts(self) -> list[Part]:
        """Every module's operations a token, in order of computation. Raises ValueError before any token."""
        if not self.tokens:
            raise ValueError("nothing has run yet")
        found = [self._embedding(), *self._neuron("embedding", "embedding.neuron")]
        for index in range(self.model.config.layers):
            found += self._block(index)
        found += [*self._norm("head", "ln_out"), *self._neuron("head", "head_neuron")]
        found.append(self._projection("head", "head", "head"))
        return found

    def _block(self, index: int) -> list[Part]:
        layer, prefix = f"block {index}", f"blocks.{index}"
        block = self.model.get_submodule(prefix)
        assert isinstance(block, Block)
        found = []
        if block.ln0 is not None:
            found += self._norm(layer, f"{prefix}.ln0")
            if block.adds_spikes:
                rounding = Count(add=2) * self._a_token(f"{prefix}.ln0")
                found.append(Part(layer, f"{prefix}.grid", "residual", rounding, twin=Count()))
        for norm, mix, neuron in (
            ("ln1", "time_mix", "time_neuron"),
            ("ln2", "channel_mix", "channel_neuron"),
        ):
            found += self._norm(layer, f"{prefix}.{norm}")
            inner = self._time_mix if mix == "time_mix" else self._channel_mix
            found += inner(layer, f"{prefix}.{mix}")
            found += self._neuron(layer, f"{prefix}.{neuron}")
            added = self.arrived[f"{prefix}.{neuron}"]
            everywhere = Count(add=added.numbers / self.tokens)
            sums = Count(add=added.nonzero / self.tokens) if added.bits else everywhere
            name = f"{prefix}.{neuron}.sum"
            found.append(Part(layer, name, "residual", sums, rate=added.rate, twin=everywhere))
        return found

    def _time_mix(self, layer: str, name: str) -> list[Part]:
        width = self._a_token(name)
        found = [Part(layer, f"{name}.mix", "mix", (DIFFERENCE + MIXTURE * 3) * width)]
        for key in ("key", "value", "receptance"):
            found += self._driven(layer, name, key)
        found.append(Part(layer, f"{name}.wkv", "wkv", WKV * width))
        found.append(Part(layer, f"{name}.gate", "gate", GATE * width))
        return found + self._driven(layer, name, "output")

    def _channel_mix(self, layer: str, name: str) -> list[Part]:
        width = self._a_token(name)
        module = self.model.get_submodule(name)
        assert isinstance(module, ChannelMix)
        found = [Part(layer, f"{name}.mix", "mix", (DIFFERENCE + MIXTURE * 2) * width)]
        found += self._driven(layer, name, "key")
        if module.squared_relu:
            activation = SQUARED_RELU * (EXPANSION * width)
            found.append(Part(layer, f"{name}.squared_relu", "activation", activation))
        found += self._neuron(layer, f"{name}.neurons.activation")
        found += [*self._driven(layer, name, "receptance"), *self._driven(layer, name, "value")]
        return [*found, Part(layer, f"{name}.gate", "gate", GATE * width)]

    def _driven(self, layer: str, name: str, key: str) -> list[Part]:
        neurons = self._neuron(layer, f"{name}.neurons.{key}")
        return [*neurons, self._projection(layer, f"{name}.{key}", "projection")]

    def _embedding(self) -> Part:
        width = self.model.config.width
        return Part("embedding", "embedding", "embedding", Count(lookup=width))

    def _norm(self, layer: str, name: str) -> list[Part]:
        count = NORM * self._a_token(name) + NORM_TOKEN
        return [Part(layer, name, "norm", count)]

    def _neuron(self, layer: str, name: str) -> list[Part]:
        module = self.model.get_submodule(name)
        if isinstance(module, NoNeuron) or name not in self.arrived:
            return []
        fired = self.arrived[name]
        each = neuron_operations(module, fired.rate) * self._a_token(name)
        if isinstance(module, LIF) and module.config.normalise_current:
            each += Count(special=1)
        return [Part(layer, name, "neuron", each, rate=fired.rate, twin=Count())]

    def _projection(self, layer: str, name: str, kind: str) -> Part:
        module = self.model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        arrived = self.arrived[name]
        dense = Count(mac=arrived.numbers * module.out_features / self.tokens)
        bits = arrived.bits
        if bits:
            accumulations = bits * arrived.nonzero * module.out_features / self.tokens
            reads = "spikes" if bits == 1 and not arrived.negative else f"graded spikes ({bits} bits)"
            if bits == 1 and arrived.negative:
                reads = "signed spikes"
            return Part(layer, name, kind, Count(ac=accumulations), reads, arrived.rate, bits, dense)
        return Part(layer, name, kind, dense, "floats", arrived.rate, 0, dense)

    def _a_token(self, name: str) -> float:
        return self.elements[name] / self.tokens


def neuron_operations(neuron: nn.Module, rate: float) -> Count:
    """Of one neuron and token; `rate`: the share of tokens at which it fires.

    A LIF takes the difference of current and membrane, scales it, adds it and compares the sum; a hard
    reset is a choice and no arithmetic, a soft one a subtraction at each spike.
    """
    if isinstance(neuron, Heaviside):
        return Count(add=1)
    assert isinstance(neuron, LIF)
    config = neuron.config
    comparisons = config.levels * (2 if config.signed else 1)
    resets = rate if config.soft_reset else 0.0
    count = Count(multiply=1, add=2 + comparisons + resets + (1 if config.v_reset else 0))
    return count + Count(multiply=2, add=1) if config.normalise_current else count


@torch.no_grad()
def count_operations(
    model: SpikeGPT,
    tokens: Tensor,
    *,
    context_length: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Part]:
    """Operations a token of each part of the model, on average over `tokens` (N,), int64.

    The text is read in windows of `context_length` tokens, each from an empty state, `batch_size` at a
    time; memory does not depend on N. `progress` is called with the number of tokens newly read. Raises
    UserError for an empty text and a model with modules that no rule is known for.
    """
    if not len(tokens):
        raise UserError("the text is empty: there is nothing to count over")
    counter, device = Counter(model), next(model.parameters()).device
    with counter.watching():
        for windows in batches(tokens, context_length, batch_size):
            model(windows.to(device))
            if progress is not None:
                progress(windows.numel())
    return counter.parts()
