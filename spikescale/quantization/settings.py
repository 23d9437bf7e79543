"""How a model folder's weights were quantised; stands in its model.json under `quantization`."""

from typing import Literal

from spikescale.config.schema import Strict


class Quantization(Strict):
    """Eight-bit integers for the weights of projections, one scale an output channel, symmetric.

    `activations`: what the projections read is rounded, too, to eight bits with one scale a token
    ("token"), so that the products are of integers; or not ("none"). Spikes, graded ones up to 127 too, are
    such integers already and are taken as they are.
    """

    weights: Literal["int8"] = "int8"
    activations: Literal["token", "none"] = "token"
