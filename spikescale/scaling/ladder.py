"""Ladders of model shapes: from sizes that people ask for to layers and widths.

Two counts of parameters are kept everywhere. `total` is all of them; `non-embedding` leaves out the table of
input embeddings and the head, whose share falls from most of a tiny model to a few percent of a large one
(Kaplan et al. 2020 count without them, Hoffmann et al. 2022 with).
"""

import math
import re
from dataclasses import dataclass

from spikescale.config.schema import ModelConfig
from spikescale.errors import UserError
from spikescale.planning import parameters as of_model
from spikescale.training.flops import training_flops_per_token

ASPECT = 128 / 3  # width over layers of the presets 46m, 216m and 430m
LEAST_LAYERS = 4
WIDTH_STEP = 16
SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Shape:
    """Layers and width of a model."""

    layers: int
    width: int

    def __str__(self) -> str:
        return f"{self.layers}x{self.width}"

    def model(self, base: ModelConfig) -> ModelConfig:
        """`base` in this shape."""
        return base.model_copy(update={"preset": None, "layers": self.layers, "width": self.width})


@dataclass(frozen=True)
class Size:
    """Parameters by both counts, and training FLOP a token."""

    total: int
    non_embedding: int
    flop_per_token: int

    @classmethod
    def of(cls, model: ModelConfig) -> "Size":
        """The size of a model whose vocabulary is set."""
        total = of_model.count(model)
        outside = 2 * of_model.vocabulary(model) * model.width
        return cls(total, total - outside, training_flops_per_token(model))


def parse_number(text: str, option: str) -> float:
    """`50k`, `2M`, `1.2e9`: a number above 0. Raises UserError."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)([kmgbt]?)", text.strip().lower())
    try:
        number = float(match[1]) * SUFFIXES[match[2]] if match else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{option} {text!r}: not a number above 0 such as 50k, 2M or 1.2e9")
    return number


def parse_numbers(text: str, option: str) -> list[float]:
    """Numbers with commas between them. Raises UserError."""
    return [parse_number(part, option) for part in text.split(",")]


def parse_shapes(text: str) -> list[Shape]:
    """Shapes such as `4x32,4x64,12x512`, or `50k:2M:7` for seven sizes between two non-embedding counts.

    Raises UserError for anything else, and for shapes that repeat.
    """
    parts = text.split(":")
    if len(parts) == 3:
        low, high = parse_number(parts[0], "--sizes"), parse_number(parts[1], "--sizes")
        if not (parts[2].isdigit() and int(parts[2]) >= 2 and low < high):
            raise UserError(f"--sizes {text}: LOW:HIGH:COUNT with LOW < HIGH and COUNT from 2 on")
        count = int(parts[2])
        ratio = (high / low) ** (1 / (count - 1))
        shapes = [shape_near(low * ratio**index) for index in range(count)]
    else:
        shapes = []
        for word in text.split(","):
            match = re.fullmatch(r"\s*([1-9][0-9]*)x([1-9][0-9]*)\s*", word)
            if not match:
                raise UserError(f"--sizes {word!r}: write LAYERSxWIDTH, with commas, or LOW:HIGH:COUNT")
            shapes.append(Shape(int(match[1]), int(match[2])))
    if len(set(shapes)) < len(shapes):
        raise UserError(f"--sizes {text}: gives {', '.join(map(str, shapes))}; each may be there once")
    return shapes


def shape_near(parameters: float) -> Shape:
    """The shape, as deep for its width as the presets, nearest to a number of non-embedding parameters."""

    def shape(width: int) -> Shape:
        return Shape(max(LEAST_LAYERS, round(width / ASPECT)), width)

    def distance(candidate: Shape) -> float:
        body = candidate.layers * (13 * candidate.width**2 + 11 * candidate.width) + 4 * candidate.width
        return abs(math.log(body / parameters))

    widest = WIDTH_STEP * math.ceil(max(64.0, 2 * (ASPECT * parameters / 13) ** (1 / 3)) / WIDTH_STEP)
    widest = max(widest, WIDTH_STEP * math.ceil((parameters / (13 * LEAST_LAYERS)) ** 0.5 / WIDTH_STEP))
    return min((shape(width) for width in range(WIDTH_STEP, widest + 1, WIDTH_STEP)), key=distance)
