"""Which parameters have a learning rate and a weight decay of their own: in pretraining and fine-tuning.

Weight decay applies to matrices only: decays, mixes and norms are not shrunk. With `width_transfer` (muP) the
matrices fed by a width-sized input have their rate scaled by tuned width over width (Yang et al. 2022, Table
8, Adam), and their weight decay by the inverse, which leaves the product.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from spikescale.config import ModelConfig

# Matrices whose input is not of the width: a table of vectors, and a LoRA adapter's B, which reads its rank.
_EMBEDDING, _ADAPTER = "embedding.weight", ".lora_B."


def group_settings(model: ModelConfig, weight_decay: float) -> list[dict[str, float]]:
    """What each group of parameters has for itself: matrices; vectors; with muP, matrices of other inputs.

    `lr_scale` is the factor of a group's rate.
    """
    base = model.width_transfer
    if base is None:
        return [{"weight_decay": weight_decay}, {"weight_decay": 0.0}]
    scale = base / model.width
    return [
        {"weight_decay": weight_decay / scale, "lr_scale": scale},
        {"weight_decay": 0.0, "lr_scale": 1.0},
        {"weight_decay": weight_decay, "lr_scale": 1.0},
    ]


def grouped(named: Iterable[tuple[str, nn.Parameter]], model: ModelConfig) -> list[list[nn.Parameter]]:
    """Parameters by name in the groups of `group_settings`; a group may be empty."""
    matrices, vectors, inputs = [], [], []
    for name, parameter in named:
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif model.width_transfer is not None and (name.endswith(_EMBEDDING) or _ADAPTER in name):
            inputs.append(parameter)
        else:
            matrices.append(parameter)
    return [matrices, vectors] if model.width_transfer is None else [matrices, vectors, inputs]


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], model: ModelConfig, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer, without empty ones: `params`, `weight_decay`, and with muP `lr_scale`.

    Whoever sets a group's rate multiplies it by `lr_scale`.
    """
    members, settings = grouped(named, model), group_settings(model, weight_decay)
    return [{"params": found, **own} for found, own in zip(members, settings, strict=True) if found]
