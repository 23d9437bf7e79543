"""Published energies of arithmetic operations, by source. All in picojoules.

They are of the arithmetic alone: reading a weight from memory, which costs more than multiplying by it
(Horowitz 2014: 5 pJ for 32 bits from an 8 KiB cache, 650 pJ or more from DRAM), moving data and leakage are
not in them.
"""

from dataclasses import dataclass

from spikescale.errors import UserError

# A division took 7.1 times as much as a multiplication on a Cortex-M4F (PMC8934428, Table 3, which takes a
# comparison for an addition, as we do); we take exponentials and roots to cost the same.
SPECIAL_IN_MULTIPLICATIONS = 7.1


@dataclass(frozen=True)
class Prices:
    """Picojoules of one operation in a technology.

    `multiply` and `add` are what element-wise arithmetic costs; a multiply-accumulate is `multiply` and
    `accumulate` together, an accumulation of a weight (a spike has arrived) is `accumulate`.
    """

    name: str
    source: str
    multiply: float
    add: float
    accumulate: float

    @property
    def mac(self) -> float:
        """A multiplication and an accumulation."""
        return self.multiply + self.accumulate

    @property
    def special(self) -> float:
        """An exponential, a division or a root."""
        return SPECIAL_IN_MULTIPLICATIONS * self.multiply


_HOROWITZ = "Horowitz 2014 (ISSCC 1.1), 45 nm, 0.9 V"
_JOUPPI = "Jouppi et al. 2021 (Ten Lessons, ISCA), 7 nm"

PRICES = {
    prices.name: prices
    for prices in (
        Prices("45nm-float32", _HOROWITZ, multiply=3.7, add=0.9, accumulate=0.9),
        Prices("paper", "SpikeGPT Table 1: MAC 4.5, AC 0.9 pJ", multiply=3.6, add=0.9, accumulate=0.9),
        Prices("45nm-float16", _HOROWITZ, multiply=1.1, add=0.4, accumulate=0.4),
        Prices("45nm-int32", _HOROWITZ, multiply=3.1, add=0.1, accumulate=0.1),
        # 8-bit weights and activations are accumulated in 32 bits.
        Prices("45nm-int8", _HOROWITZ, multiply=0.2, add=0.03, accumulate=0.1),
        Prices("7nm-float32", _JOUPPI, multiply=1.31, add=0.38, accumulate=0.38),
        Prices("7nm-bfloat16", _JOUPPI, multiply=0.21, add=0.11, accumulate=0.11),
        Prices("7nm-int8", _JOUPPI, multiply=0.07, add=0.007, accumulate=0.03),
    )
}
DEFAULT_PRICES = "45nm-float32"

# Picojoules of a synaptic operation as measured on whole chips, memory and all: what an accumulation really
# costs there. As compared by Tang et al. 2023 (doi 10.3389/fnins.2023.1187252, Table 3).
SYNAPTIC_OPERATIONS = {
    "Tianjic (28 nm)": 1.54,
    "TrueNorth (28 nm)": 2.5,
    "SENECA (22 nm)": 2.8,
    "SpiNNaker 2 (22 nm)": 10.0,
    "ODIN (28 nm)": 12.7,
    "Loihi (14 nm)": 23.6,
    "SpiNNaker (130 nm)": 45.0,
}


def find_prices(name: str) -> Prices:
    """The prices of that name. Raises UserError for one that is not there."""
    if name not in PRICES:
        raise UserError(f"--prices {name}: unknown; there are {', '.join(PRICES)}")
    return PRICES[name]
