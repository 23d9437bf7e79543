"""Means over seeds with t intervals, and differences between variants seed by seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the interval that holds the true one with the stated confidence.

    Student's t over n values; with a single value there is no interval, and low and high are not numbers.
    """

    mean: float
    low: float
    high: float
    deviation: float  # of the sample, n - 1

    @property
    def half_width(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The t interval of the mean of `values`, of which there is at least one."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan, math.nan)
    from scipy.stats import t

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, deviation)


def paired_difference(
    values: dict[int, float], reference: dict[int, float], confidence: float = 0.95
) -> Interval | None:
    """The t interval of value minus reference over the seeds that both have; None if there is none.

    Runs of one seed read the same data in the same order, so that much of what scatters cancels.
    """
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    return t_interval([values[seed] - reference[seed] for seed in seeds], confidence)
