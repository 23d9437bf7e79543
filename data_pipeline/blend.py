"""Mixtures of prepared data sets: which source the i-th sample comes from, as a pure function of i.

Shares are whole multiples of 1 / PERIOD. Sources take turns by Tijdeman's solution of the chairman
assignment problem (Discrete Mathematics 32, 1980): after any number t of samples each of n sources has had
its share of t to within 1 - 1 / (2 n - 2) samples, the least that is possible in general. After PERIOD
samples every count is exact, so one period is computed and repeated, and a source's own position follows
from i.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spikescale.data_pipeline.stream import TokenStream
from spikescale.errors import UserError

PERIOD = 10_000


@dataclass(frozen=True)
class Ingredient:
    """One source of a mixture.

    Attributes:
        name: how it is called in metrics and positions.
        stream: its samples, in its own order.
        weight: its share of the tokens, relative to the other sources' weights.
    """

    name: str
    stream: TokenStream
    weight: float


class Blend:
    """Endless samples drawn from several sources by weight, each source in its own seeded order.

    Raises UserError for weights that are not positive, one that is below 1 / PERIOD of the whole, names that
    repeat, and sources of different tokenizers or context lengths.
    """

    def __init__(self, ingredients: Sequence[Ingredient]) -> None:
        if len({ingredient.name for ingredient in ingredients}) != len(ingredients) or not ingredients:
            raise UserError("data.sources: every source needs a name of its own, and there must be one")
        self.ingredients = list(ingredients)
        first = ingredients[0]
        for ingredient in ingredients[1:]:
            ours, theirs = first.stream.manifest.tokenizer, ingredient.stream.manifest.tokenizer
            if ours.sha256 != theirs.sha256:
                raise UserError(
                    f"data.sources: {ingredient.name} was prepared with tokenizer {theirs.kind}"
                    f" {theirs.sha256[:12]}, {first.name} with {ours.kind} {ours.sha256[:12]}"
                    f"{_why(ours.kind, theirs.kind)}"
                )
            if ingredient.stream.context_length != first.stream.context_length:
                raise ValueError("sources of different context lengths")
        self.context_length = first.stream.context_length
        self.counts = parts_of_period([ingredient.weight for ingredient in ingredients])
        for ingredient, count in zip(ingredients, self.counts, strict=True):
            if count == 0:
                raise UserError(
                    f"data.sources: {ingredient.name} would make less than 1 sample in {PERIOD}: raise"
                    " its weight"
                )
        self._turns = turns(self.counts)
        self._ranks = np.empty(
            PERIOD, dtype=np.int64
        )  # how many samples of its source come before, in a period
        for source in range(len(ingredients)):
            places = self._turns == source
            self._ranks[places] = np.arange(int(places.sum()))

    @property
    def shares(self) -> dict[str, float]:
        """The share of the samples that each source makes."""
        names = (ingredient.name for ingredient in self.ingredients)
        return {name: count / PERIOD for name, count in zip(names, self.counts, strict=True)}

    def sources(self, start: int, count: int) -> np.ndarray:
        """The source of each of the samples start .. start + count - 1, as a position in the list; int64."""
        return self._turns[np.arange(start, start + count) % PERIOD]

    def place(self, index: int) -> tuple[int, int]:
        """The source of sample `index`, and the sample's number in that source."""
        period, rest = divmod(index, PERIOD)
        source = int(self._turns[rest])
        return source, period * self.counts[source] + int(self._ranks[rest])

    def rows(self, start: int, count: int) -> torch.Tensor:
        """Samples start .. start + count - 1 as a (count, T + 1) int64 tensor."""
        rows = np.empty((count, self.context_length + 1), dtype=np.int64)
        for row in range(count):
            source, index = self.place(start + row)
            self.ingredients[source].stream.read_into(rows[row], index)
        return torch.from_numpy(rows)

    def taken(self, index: int) -> list[int]:
        """How many of the first `index` samples come from each source."""
        period, rest = divmod(index, PERIOD)
        begun = np.bincount(self._turns[:rest], minlength=len(self.counts))
        return [period * count + int(more) for count, more in zip(self.counts, begun, strict=True)]

    def position(self, index: int) -> dict[str, Any]:
        """What sample number `index` refers to: the shares, and each source's own position."""
        taken = self.taken(index)
        parts = zip(self.ingredients, self.counts, taken, strict=True)
        # A list: the order of the sources decides whose turn it is.
        return {
            "sources": [
                {
                    "name": ingredient.name,
                    "count": count,
                    "samples": number,
                    **ingredient.stream.position(number),
                }
                for ingredient, count, number in parts
            ]
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Number the samples as when the position was taken.

        Raises UserError when mixture or order differ.
        """
        sources = position.get("sources")
        if sources is None:
            raise UserError("cannot continue in the data: it was one data set and is now a mixture")
        before = [(source["name"], source["count"]) for source in sources]
        names = [ingredient.name for ingredient in self.ingredients]
        now = list(zip(names, self.counts, strict=True))
        if before != now:
            raise UserError(
                f"cannot continue in the data: the mixture was {_shares(before)} and is now {_shares(now)}"
            )
        for ingredient, source in zip(self.ingredients, sources, strict=True):
            ingredient.stream.restore(source)

    def interrupt(self, on: bool) -> None:
        """See `TokenStream.interrupt`."""
        for ingredient in self.ingredients:
            ingredient.stream.interrupt(on)


def parts_of_period(weights: Sequence[float]) -> list[int]:
    """Samples of each source in a period: the weights' shares of it, rounded by largest remainder."""
    if any(not weight > 0 for weight in weights):
        raise UserError(f"data.sources: weights must be positive, not {list(weights)}")
    exact = np.asarray(weights, dtype=np.float64) * (PERIOD / float(np.sum(weights)))
    counts = np.floor(exact).astype(np.int64)
    missing = PERIOD - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return [int(count) for count in counts]


def turns(counts: Sequence[int]) -> np.ndarray:
    """The source of each sample of a period (sum of counts,), int64, by Tijdeman's rule.

    In whole numbers: with period P, a source that has had x of its c samples before sample t may have that
    one if 2 (n - 1) (c t - P x) >= P; of these the one whose share runs over first has it.
    """
    period, sources = sum(counts), len(counts)
    if sources == 1:
        return np.zeros(period, dtype=np.int64)
    had = [0] * sources
    result = np.empty(period, dtype=np.int64)
    slack = 2 * (sources - 1)
    for turn in range(1, period + 1):
        best, choice = None, -1
        for source, count in enumerate(counts):
            due = count * turn - period * had[source]
            if count and slack * due >= period:
                # (1 - 1 / slack - due / period) / (count / period), times slack
                urgency = ((slack - 1) * period - slack * due) / count
                if best is None or urgency < best:
                    best, choice = urgency, source
        result[turn - 1] = choice
        had[choice] += 1
    return result


def _why(ours: str, theirs: str) -> str:
    learns = ours.startswith(("char", "sentencepiece", "syllable")) or ours.endswith("+conditions")
    return ": each has learnt from its own text" if ours == theirs and learns else ""


def _shares(counts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count / PERIOD:.2%}" for name, count in counts)
