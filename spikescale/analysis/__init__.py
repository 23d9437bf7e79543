"""What a model's neurons do while it reads: rates, intervals, membranes, as numbers, pictures and a page."""

from spikescale.analysis.collect import Analysis, analyse
from spikescale.analysis.statistics import LayerStatistics

__all__ = ["Analysis", "LayerStatistics", "analyse"]
