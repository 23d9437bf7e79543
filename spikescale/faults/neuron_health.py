"""Neurons that never fire, or always: how many of each layer, and a word when a layer crosses a limit.

A neuron that never fires passes nothing on and gets hardly a gradient; one that always fires carries no
information. A rate is taken over the tokens of the monitored passes of the last logged steps, on all ranks.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spikescale.config import FaultConfig
from spikescale.model.neuron import Neuron
from spikescale.parallel import Layout

MEANING = {"silent": "never fire", "saturated": "fire all the time"}
PASSES = 4  # logged steps that a neuron's rate is taken over


@dataclass(frozen=True)
class Health:
    """Of each layer: its mean firing rate, and the shares of its neurons that are dead or saturated."""

    rates: dict[str, float]
    dead: dict[str, float]
    saturated: dict[str, float]

    @property
    def mean_rate(self) -> float | None:
        """Over the layers without the binary embedding; None when there are none."""
        inner = [rate for name, rate in self.rates.items() if not name.startswith("embedding")]
        return sum(inner) / len(inner) if inner else None


@dataclass(frozen=True)
class Change:
    """A layer that crossed a limit: `event` is silent, saturated or recovered."""

    layer: str
    event: str
    share: float

    @property
    def sentence(self) -> str:
        """For people."""
        if self.event == "recovered":
            return f"{self.layer}: recovered, {self.share:.0%} of its neurons are dead or saturated"
        return f"{self.layer}: {self.share:.0%} of its neurons {MEANING[self.event]}"


class NeuronHealth:
    """Watches the neurons of a model. `neurons`: (name, module), as `SpikeGPT.neurons` gives them."""

    def __init__(
        self, config: FaultConfig, neurons: Sequence[tuple[str, Neuron]], layout: Layout, device: torch.device
    ) -> None:
        self.config, self._neurons, self._layout, self._device = config, neurons, layout, device
        self._passes: deque[torch.Tensor] = deque(maxlen=PASSES)
        self._warned: dict[str, str] = {}

    def observe(self) -> Health:
        """Take in the last monitored pass. Every rank calls it; all get the same."""
        if not self._neurons:
            return Health({}, {}, {})
        here = [neuron.channel_rates.to(self._device) for _, neuron in self._neurons]
        latest = self._over_ranks(torch.cat(here))
        self._passes.append(latest)
        known = torch.stack(list(self._passes)).mean(0)
        sizes = [rates.numel() for rates in here]
        rates, dead, saturated = {}, {}, {}
        parts = zip(self._neurons, latest.split(sizes, 1), known.split(sizes, 1), strict=True)
        for (name, _), now, mean in parts:
            rates[name] = float(now.mean())
            dead[name] = float((mean <= self.config.dead_rate).float().mean())
            saturated[name] = float((mean >= self.config.saturated_rate).float().mean())
        return Health(rates, dead, saturated)

    def _over_ranks(self, rates: torch.Tensor) -> torch.Tensor:
        """(tensor, channels): the mean over the ranks with the same channels, a row for each part of them."""
        layout = self._layout
        table = torch.zeros(layout.tensor, rates.numel(), device=rates.device)
        table[layout.tensor_rank] = rates
        if layout.world_size > 1:
            torch.distributed.all_reduce(table)
            table /= layout.world_size // layout.tensor
        return table.cpu()

    def changes(self, health: Health) -> list[Change]:
        """The layers that crossed a limit since the last call, in either direction.

        Until a rate is taken over all PASSES logged steps, no layer is judged.
        """
        if len(self._passes) < PASSES:
            return []
        found = []
        for name, _ in self._neurons:
            dead, saturated = health.dead[name], health.saturated[name]
            now = ""
            if dead >= self.config.silent_share:
                now = "silent"
            elif saturated >= self.config.saturated_share:
                now = "saturated"
            if now != self._warned.get(name, ""):
                share = {"silent": dead, "saturated": saturated}.get(now, max(dead, saturated))
                found.append(Change(name, now or "recovered", share))
                self._warned[name] = now
        return found

    def state_dict(self) -> dict[str, Any]:
        """Which layers have been warned of."""
        return {name: state for name, state in self._warned.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._passes.clear()
        self._warned = dict(state)
