"""Statistics of one layer of neurons that are taken in piece by piece: memory does not grow with the text."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RANGE, BINS = 4.0, 160  # of the histogram of membranes, in thresholds on either side of 0
LONGEST_INTERVAL = 128  # tokens; longer ones are counted together
DETAIL_TOKENS = 200  # of the first window, kept whole for rasters and traces
MOST_CHANNELS = 512  # of a layer, kept in them
OUTLIER_DEVIATIONS = 6.0  # a membrane further from its neuron's mean is an outlier


@dataclass
class Detail:
    """The first tokens of the first window, whole: spikes and membranes (T, C), C of them evenly chosen."""

    channels: NDArray[np.int64]
    spikes: NDArray[np.float32]
    membranes: NDArray[np.float32] | None


@dataclass
class LayerStatistics:
    """Of one layer of `channels` neurons.

    `threshold` (C,) is what membranes are measured in; None: a Heaviside step, whose input is taken for its
    membrane, at a threshold of 0. Intervals are between two spikes of a neuron within one window.
    """

    name: str
    channels: int
    threshold: NDArray[np.float64] | None = None
    tokens: int = 0
    spikes: NDArray[np.float64] = field(init=False)
    detail: Detail | None = None

    def __post_init__(self) -> None:
        self.spikes = np.zeros(self.channels)
        self.intervals = np.zeros(LONGEST_INTERVAL + 1, dtype=np.int64)  # the last one: longer
        self._interval_count = np.zeros(self.channels)
        self._interval_sum = np.zeros(self.channels)
        self._interval_squares = np.zeros(self.channels)
        # Running moments of each neuron's membrane (Chan et al. 1979).
        self._mean = np.zeros(self.channels)
        self._squares = np.zeros(self.channels)
        self.histogram = np.zeros(BINS + 2, dtype=np.int64)  # below, BINS of equal width, above
        self.largest, self.lowest = -math.inf, math.inf
        self.outliers = 0

    def take(self, spikes: Tensor, membranes: Tensor) -> None:
        """Take in the spikes and membranes (B, T, C) of B windows."""
        fired = (spikes != 0).cpu().numpy()
        h = membranes.double().cpu().numpy()
        if self.detail is None:
            self._keep_detail(spikes[0].float().cpu().numpy(), h[0])
        self._take_membranes(h.reshape(-1, self.channels))
        self.tokens += fired.shape[0] * fired.shape[1]
        self.spikes += fired.sum((0, 1))
        for window in fired:
            self._take_intervals(window)

    def _keep_detail(self, spikes: NDArray[np.float32], h: NDArray[np.float64]) -> None:
        count = min(self.channels, MOST_CHANNELS)
        chosen = np.linspace(0, self.channels - 1, count).round().astype(np.int64)
        kept = h[:DETAIL_TOKENS, chosen].astype(np.float32)
        self.detail = Detail(chosen, spikes[:DETAIL_TOKENS, chosen], kept)

    def _take_membranes(self, h: NDArray[np.float64]) -> None:
        # Outliers are judged by what was known before; the first piece by itself.
        mean, deviation = (self._mean, self.deviation) if self.tokens else (h.mean(0), h.std(0))
        far = np.abs(h - mean) > OUTLIER_DEVIATIONS * np.maximum(deviation, 1e-12)
        self.outliers += int(far.sum())
        count, seen = len(h), self.tokens
        new_mean = h.mean(0)
        difference = new_mean - self._mean
        self._squares += ((h - new_mean) ** 2).sum(0) + difference**2 * (seen * count / (seen + count))
        self._mean = self._mean + difference * (count / (seen + count))
        scaled = h if self.threshold is None else h / self.threshold
        places = np.floor((scaled + RANGE) * (BINS / (2 * RANGE))).astype(np.int64)
        self.histogram += np.bincount(np.clip(places, -1, BINS).ravel() + 1, minlength=BINS + 2)
        self.largest = max(self.largest, float(scaled.max()))
        self.lowest = min(self.lowest, float(scaled.min()))

    def _take_intervals(self, fired: NDArray[np.bool_]) -> None:
        channel, when = np.nonzero(fired.T)
        same = channel[1:] == channel[:-1]
        lengths, owner = np.diff(when)[same], channel[1:][same]
        self.intervals += np.bincount(
            np.minimum(lengths, LONGEST_INTERVAL + 1) - 1, minlength=LONGEST_INTERVAL + 1
        )
        for total, values in (
            (self._interval_count, np.ones_like(lengths, dtype=np.float64)),
            (self._interval_sum, lengths),
            (self._interval_squares, lengths.astype(np.float64) ** 2),
        ):
            total += np.bincount(owner, weights=values, minlength=self.channels)

    @property
    def rates(self) -> NDArray[np.float64]:
        """Share of tokens at which each neuron fired (C,)."""
        return self.spikes / max(self.tokens, 1)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean membrane of each neuron (C,), in the membrane's own unit."""
        return self._mean

    @property
    def deviation(self) -> NDArray[np.float64]:
        """Standard deviation of each neuron's membrane (C,)."""
        return np.sqrt(self._squares / max(self.tokens, 1))

    def dead(self, rate: float) -> NDArray[np.bool_]:
        """Which neurons fire at no more than this share of the tokens."""
        return self.rates <= rate

    def saturated(self, rate: float) -> NDArray[np.bool_]:
        """Which fire at no less."""
        return self.rates >= rate

    @property
    def mean_interval(self) -> float | None:
        """Tokens from one spike of a neuron to its next; None where none fired twice."""
        count = self._interval_count.sum()
        return float(self._interval_sum.sum() / count) if count else None

    @property
    def interval_variation(self) -> float | None:
        """Coefficient of variation of a neuron's intervals, the mean over those with two or more.

        1 for a Poisson process, 0 for a clock.
        """
        enough = self._interval_count >= 2
        if not enough.any():
            return None
        count = self._interval_count[enough]
        mean = self._interval_sum[enough] / count
        variance = np.maximum(self._interval_squares[enough] / count - mean**2, 0.0)
        return float((np.sqrt(variance) / mean).mean())

    def edges(self) -> NDArray[np.float64]:
        """Edges of the histogram's inner bins, in thresholds."""
        return np.linspace(-RANGE, RANGE, BINS + 1)

    def as_dict(self, dead_rate: float, saturated_rate: float) -> dict[str, Any]:
        """Everything in numbers, for JSON."""
        quantiles = np.quantile(self.rates, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
        return {
            "neurons": self.channels,
            "firing_rate": float(self.rates.mean()),
            "firing_rate_quantiles_5_25_50_75_95": quantiles,
            "firing_rate_of_neurons": self.rates.round(6).tolist(),
            "dead_neurons": int(self.dead(dead_rate).sum()),
            "saturated_neurons": int(self.saturated(saturated_rate).sum()),
            "mean_interval": self.mean_interval,
            "interval_variation": self.interval_variation,
            "intervals": self.intervals.tolist(),
            "membrane_mean": float(self.mean.mean()),
            "membrane_deviation": float(self.deviation.mean()),
            "membrane_largest_in_thresholds": self.largest,
            "membrane_lowest_in_thresholds": self.lowest,
            "membrane_outliers": self.outliers,
            "membrane_outlier_share": self.outliers / max(self.tokens * self.channels, 1),
            "membrane_histogram": self.histogram.tolist(),
            "membrane_histogram_range_in_thresholds": RANGE,
        }


def threshold_of(neuron: torch.nn.Module, channels: int) -> NDArray[np.float64] | None:
    """The thresholds (C,) of a LIF; None for a Heaviside step."""
    constants = getattr(neuron, "constants", None)
    if constants is None:
        return None
    _, threshold = constants()
    return np.broadcast_to(np.asarray(torch.as_tensor(threshold).detach().cpu(), np.float64), (channels,))
