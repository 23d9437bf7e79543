"""How much of a model is in this process: all of it, unless a subclass of `Parts` says otherwise."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikescale.config.schema import NeuronConfig
from spikescale.model.embedding import Embedding
from spikescale.model.loss import language_model_loss

if TYPE_CHECKING:
    from spikescale.model.spikegpt import SpikeGPT


class Parts:
    """Builds the pieces of a model that may be divided, and moves tensors between whole and divided.

    The residual stream, LayerNorms and token mixtures are whole. What is computed from the tensors that
    passed `enter` may be divided by channels: each process then holds `channels(width)` of them, until a
    `row` projection adds up all parts' contributions, or `gather` puts their channels side by side. This
    class divides nothing.

    A state that the model returns belongs to the process that computed it: its divided entries are local.
    """

    size = 1  # parts that the model is divided into
    rank = 0  # which of them is here
    group: Any = None  # the torch.distributed group of those that hold the others

    def channels(self, width: int) -> int:
        """How many of `width` divided channels are here."""
        return width

    def vector(self, width: int) -> nn.Parameter:
        """One parameter for each divided channel: (channels(width),), without values."""
        return nn.Parameter(torch.empty(width))

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """A bias-free projection from a whole input (..., in_features) to divided outputs."""
        return nn.Linear(in_features, out_features, bias=False)

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """A bias-free projection from a divided input of `in_features` to a whole output."""
        return nn.Linear(in_features, out_features, bias=False)

    def head(self, width: int, vocab_size: int) -> nn.Module:
        """A bias-free projection from a whole input to logits, which may be divided by vocabulary."""
        return nn.Linear(width, vocab_size, bias=False)

    def embedding(self, vocab_size: int, width: int, binary: bool, neuron: NeuronConfig) -> nn.Module:
        """What `Embedding` is: tokens (B, T) int64 -> whole vectors (B, T, width)."""
        return Embedding(vocab_size, width, binary, neuron)

    def enter(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Whole tensors as inputs of divided computation: unchanged; gradients of all parts add up."""
        return tensors

    def gather(self, x: Tensor) -> Tensor:
        """The divided x (..., channels(width)) of all parts side by side: whole, (..., width)."""
        return x

    def full_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of a parameter of the whole model, of which `parameter` is what is here."""
        return tuple(parameter.shape)

    def local_slice(self, full: Tensor, parameter: Tensor) -> Tensor:
        """What of `full`, a tensor of `full_shape(parameter)`, is here."""
        return full

    def loss(self, logits: Tensor, targets: Tensor, regulariser: float) -> tuple[Tensor, Tensor]:
        """`language_model_loss` of the logits as the head gives them, which may be overwritten."""
        return language_model_loss(logits, targets, regulariser)

    def token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target (N,) under the logits (N, ...) as the head gives them, float32 (N,).

        The logits may be overwritten.
        """
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def whole_logits(self, model: "SpikeGPT") -> Any:
        """The model as `generate` calls it, with whole logits (B, T, V); all parts call it together."""
        return model
