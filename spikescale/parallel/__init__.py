"""Dividing one model and one sequence over ranks: tensor and context parallelism."""

from spikescale.parallel.layout import Layout

__all__ = ["Layout"]
