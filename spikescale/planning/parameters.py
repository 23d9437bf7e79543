"""The parameters of a SpikeGPT by role, without building one."""

from dataclasses import dataclass
from math import prod

from spikescale.config.schema import ModelConfig
from spikescale.errors import UserError

EXPANSION = 4  # inner width of the channel mix over the model's


@dataclass(frozen=True)
class Parameter:
    """`count` parameters of one shape and role."""

    name: str
    shape: tuple[int, ...]
    count: int
    split: int | None = None  # dimension that is divided over tensor ranks; None: each holds a copy
    multiplied: bool = False  # the weight of a projection

    def elements(self, tensor: int = 1) -> int:
        """Elements of all `count` of them on one of `tensor` ranks; an uneven vocabulary is padded."""
        return self.count * self.each(tensor)

    def each(self, tensor: int = 1) -> int:
        """Elements of one of them on one of `tensor` ranks."""
        if self.split is None:
            return prod(self.shape)
        lengths = list(self.shape)
        lengths[self.split] = -(-lengths[self.split] // tensor)
        return prod(lengths)


def vocabulary(model: ModelConfig) -> int:
    """The number of symbols. Raises UserError when it is not set."""
    if model.vocab_size is None:
        raise UserError("model.vocab_size is not set: give a number >= 2, or the data's tokenizer")
    return model.vocab_size


def parameters(model: ModelConfig) -> list[Parameter]:
    """All parameters of the model; only learned neurons depend on its variant."""
    width, layers, symbols = model.width, model.layers, vocabulary(model)
    inner, square = EXPANSION * width, (width, width)

    def matrix(name: str, shape: tuple[int, int], count: int, split: int | None) -> Parameter:
        return Parameter(name, shape, count, split, multiplied=True)

    return [
        Parameter("embedding", (symbols, width), 1, split=0),
        matrix("head", (symbols, width), 1, 0),
        matrix("time_mix key, value, receptance", square, 3 * layers, 0),
        matrix("time_mix output", square, layers, 1),
        matrix("channel_mix key", (inner, width), layers, 0),
        matrix("channel_mix value", (width, inner), layers, 1),
        matrix("channel_mix receptance", square, layers, 0),
        Parameter("time_mix decay, first", (width,), 2 * layers, split=0),
        Parameter("token mixes", (width,), 5 * layers),
        Parameter("layer norms", (width,), 4 * layers + 4),
        *_neurons(model),
    ]


def _neurons(model: ModelConfig) -> list[Parameter]:
    """What neurons learn: a number or two for each channel of each of them."""
    each = model.neuron.learn_tau + model.neuron.learn_threshold
    # Groups of neurons as wide as the model and as ChannelMix within, a layer; and those before the head.
    narrow, wide, last = {
        "spikegpt": (2, 0, 0),
        "spikegpt-b": (2, 1, 0),
        "spikegpt-driven": (6, 1, 1),
    }.get(model.variant, (0, 0, 0))
    if not each or not narrow:
        return []
    parts = [Parameter("neurons", (model.width,), each * (narrow * model.layers + last))]
    if wide:
        inner = (EXPANSION * model.width,)
        parts.append(Parameter("inner neurons", inner, each * wide * model.layers))
    return parts


def count(model: ModelConfig, tensor: int = 1) -> int:
    """Parameters on one of `tensor` ranks."""
    return sum(parameter.elements(tensor) for parameter in parameters(model))


def count_matrices(model: ModelConfig, tensor: int = 1) -> int:
    """Those of two dimensions: the optimizer's first group, which weight decay reaches."""
    return sum(p.elements(tensor) for p in parameters(model) if len(p.shape) == 2)


def count_projections(model: ModelConfig, tensor: int = 1) -> int:
    """Weights of projections, each of which costs 6 floating-point operations a token in training."""
    return sum(p.elements(tensor) for p in parameters(model) if p.multiplied)


def largest(model: ModelConfig, tensor: int = 1) -> int:
    """Elements of the largest single parameter."""
    return max(parameter.each(tensor) for parameter in parameters(model))
