"""What a law says of the presets at a budget, and how far that is from where it was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spikescale.config import load_model_preset
from spikescale.scaling.bootstrap import Interval
from spikescale.scaling.fit import FormResult
from spikescale.scaling.ladder import Size
from spikescale.scaling.points import Count, Point

PRESETS = ("216m", "430m", "1b2")


@dataclass(frozen=True)
class Forecast:
    """The loss of a preset trained with a budget. beyond: its FLOP over the largest of the points."""

    preset: str
    size: float
    flop: float
    tokens: float
    loss: Interval
    beyond: float


def forecast(
    form: FormResult, points: Sequence[Point], vocab_size: int, count: Count, budgets: Sequence[float]
) -> list[Forecast]:
    """Each preset, with the vocabulary of the points, at each budget of FLOP; intervals are of single"
    " runs."""
    most = max(point.flop for point in points)
    found = []
    for preset in PRESETS:
        size = Size.of(load_model_preset(preset, vocab_size=vocab_size))
        parameters = float(size.total if count == "total" else size.non_embedding)
        for flop in budgets:
            tokens = flop / size.flop_per_token
            (loss,) = form.predict(np.array([parameters]), np.array([tokens]), noise=True)
            found.append(Forecast(preset, parameters, flop, tokens, loss, flop / most))
    return found
