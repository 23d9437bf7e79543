"""Operations, and the parts of a model that did them."""

import dataclasses
from dataclasses import dataclass

from spikescale.energy.constants import Prices


@dataclass(frozen=True)
class Count:
    """Numbers of operations; of one token, where nothing else is said."""

    mac: float = 0.0  # multiply-accumulates of projections that read floats
    ac: float = 0.0  # accumulations of projections that read spikes, a graded one as often as it has bits
    multiply: float = 0.0
    add: float = 0.0  # comparisons, too
    special: float = 0.0  # exponentials, divisions, roots
    lookup: float = 0.0  # numbers read from a table, without arithmetic

    def __add__(self, other: "Count") -> "Count":
        return Count(*(a + b for a, b in zip(_numbers(self), _numbers(other), strict=True)))

    def __mul__(self, factor: float) -> "Count":
        return Count(*(factor * number for number in _numbers(self)))

    def energy(self, prices: Prices) -> float:
        """Picojoules."""
        return (
            self.mac * prices.mac
            + self.ac * prices.accumulate
            + self.multiply * prices.multiply
            + self.add * prices.add
            + self.special * prices.special
        )


def _numbers(count: Count) -> tuple[float, ...]:
    return dataclasses.astuple(count)


@dataclass(frozen=True)
class Part:
    """One module's operations a token.

    `kind`: embedding, norm, mix, projection, wkv, gate, activation, neuron, residual or head. `reads`: what
    came into a projection: spikes, graded spikes, floats, or nothing at all. `rate`: the share of that
    which was not 0. `twin`: what the part takes in the float twin; None: the same.
    """

    layer: str  # "embedding", "block 0", ..., "head"
    name: str
    kind: str
    count: Count
    reads: str = ""
    rate: float | None = None
    bits: int = 0
    twin: Count | None = None

    @property
    def dense(self) -> float:
        """Multiply-accumulates of a projection if it read floats; 0 for other parts."""
        return 0.0 if self.twin is None else self.twin.mac
