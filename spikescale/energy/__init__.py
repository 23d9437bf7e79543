"""What a token costs: operations that were done, at published energies, beside what is claimed."""

from spikescale.energy.constants import PRICES, Prices
from spikescale.energy.count import count_operations
from spikescale.energy.operations import Count, Part
from spikescale.energy.summary import Summary, summarise

__all__ = ["PRICES", "Count", "Part", "Prices", "Summary", "count_operations", "summarise"]
