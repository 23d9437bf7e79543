"""Initial weights, a pure function of (configuration, seed, parameter name).

Every parameter draws from a generator of its own, so a weight does not depend on the order of
creation, on the rank, or on how the model is sharded: a shard is a slice of `initial_value`.
"""

import hashlib
import math
import re

import torch
from torch import Tensor, nn

from spikescale.config.schema import ModelConfig
from spikescale.model.parts import Parts

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def initialise(model: nn.Module, config: ModelConfig, seed: int, parts: Parts) -> None:
    """Overwrite all parameters of `model` by their initial values; parameters on "meta" are left alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                value = initial_value(name, parts.full_shape(parameter), config, seed)
                parameter.copy_(parts.local_slice(value, parameter))


def initial_value(name: str, shape: torch.Size | tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole initial value, float32 on CPU, of the parameter called `name` in a `SpikeGPT`.

    Raises KeyError for a name that no SpikeGPT has.
    """
    if name == "embedding.weight":
        return _orthogonal(name, shape, 1e-4 * math.sqrt(max(shape)), seed)
    if name == "head.weight":
        vocab_size, width = shape
        gain = 0.5 * math.sqrt(max(vocab_size / width, 1.0))
        if config.width_transfer is not None:
            # muP: logits of a wide model start smaller (Yang et al. 2022, Table 8). The other matrices are
            # orthogonal, whose spectral norm does not grow with the width, or zero: nothing to scale.
            gain *= math.sqrt(config.width_transfer / width)
        return _orthogonal(name, shape, gain, seed)
    match = _BLOCK.fullmatch(name)
    layer, local = (int(match[1]), match[2]) if match else (0, name)
    if re.fullmatch(r"ln(0|1|2|_out)\.(weight|bias)", local):
        return torch.ones(shape) if local.endswith("weight") else torch.zeros(shape)
    if local.endswith(".tau_logit"):
        return torch.full(shape, -math.log(config.neuron.tau - 1))
    if local.endswith(".log_threshold"):
        return torch.full(shape, math.log(config.neuron.v_threshold))
    if local in _ZERO:
        return torch.zeros(shape)
    if local in _GAINS:
        return _orthogonal(name, shape, _GAINS[local], seed)
    return _VECTORS[local](layer, config.layers, config.width)


_ZERO = {
    "time_mix.key.weight",
    "time_mix.receptance.weight",
    "time_mix.output.weight",
    "channel_mix.value.weight",
    "channel_mix.receptance.weight",
}
_GAINS = {"time_mix.value.weight": 1.0, "channel_mix.key.weight": 2.0}


def _depth(layer: int, layers: int) -> float:
    """0 at the first layer, 1 at the last; 0 when there is only one."""
    return layer / (layers - 1) if layers > 1 else 0.0


def _channels(width: int) -> Tensor:
    return torch.arange(width, dtype=torch.float64)


def _mu(layer: int, layers: int, width: int, power: float = 1.0, offset: float = 0.0) -> Tensor:
    """(i/C)^(power (1 - l/L)) + offset * depth."""
    ratio = _channels(width) / width
    return (ratio ** (power * (1 - layer / layers)) + offset * _depth(layer, layers)).float()


def _time_decay(layer: int, layers: int, width: int) -> Tensor:
    ratio = _channels(width) / max(width - 1, 1)
    return (-5 + 8 * ratio ** (0.7 + 1.3 * _depth(layer, layers))).float()


def _time_first(layer: int, layers: int, width: int) -> Tensor:
    zigzag = (_channels(width) + 1) % 3 - 1
    return (math.log(0.3) + 0.5 * zigzag).float()


_VECTORS = {
    "time_mix.mu_key": _mu,
    "time_mix.mu_value": lambda layer, layers, width: _mu(layer, layers, width, offset=0.3),
    "time_mix.mu_receptance": lambda layer, layers, width: _mu(layer, layers, width, power=0.5),
    "time_mix.time_decay": _time_decay,
    "time_mix.time_first": _time_first,
    "channel_mix.mu_key": _mu,
    "channel_mix.mu_receptance": _mu,
}


def _orthogonal(name: str, shape: torch.Size | tuple[int, ...], gain: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    value = torch.empty(tuple(shape))
    nn.init.orthogonal_(value, gain, generator)
    return value
