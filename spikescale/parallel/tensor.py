"""Tensor parallelism: one model over several ranks, divided by channels and by vocabulary.

    embedding      rows of the table, summed over the group
    time mix       key, value, receptance by output channel; WKV with its decay and bonus, and the neurons
                   between the projections, on local channels; output by input channel, summed
    channel mix    key by inner channel, activation local, value by inner channel, summed; receptance by
                   output channel, gathered
    head           rows, and the loss without gathering logits
    the rest       residual stream, LayerNorm, token mixtures and the neurons that read whole vectors are
                   computed alike on every rank

Forward communicates, a block and token of C channels, two sums (output, value) and one gather (receptance);
backward two sums, those of the gradients of what a sub-block reads.
"""

from typing import Any, cast

from torch import Tensor, nn

from spikescale.config import ModelConfig
from spikescale.config.schema import NeuronConfig
from spikescale.errors import UserError
from spikescale.model.parts import Parts
from spikescale.model.spikegpt import SpikeGPT
from spikescale.model.state import State
from spikescale.parallel import regions, shards
from spikescale.parallel.layout import Layout
from spikescale.parallel.mpu import ModelParallelUnit
from spikescale.parallel.vocab_loss import vocab_language_model_loss, vocab_token_losses


class TensorParts(Parts):
    """The part of a model that one rank of a tensor group holds.

    Args:
        group: the torch.distributed group of the ranks that hold the other parts. It must be megatron-core's
            tensor group, by which its cross-entropy goes (`tensor_parts`).
        vocab_size: ids of the whole model; padded here to a multiple of the group's size.

    Building a model raises UserError for a width that the group's size does not divide.
    """

    def __init__(self, group: Any, vocab_size: int) -> None:
        self.group, self.vocab_size = group, vocab_size
        self.size, self.rank = group.size(), group.rank()

    def channels(self, width: int) -> int:
        """How many of `width` divided channels are here. Raises UserError unless they divide evenly."""
        if width % self.size:
            raise UserError(
                f"parallel.tensor = {self.size}: does not divide {width} channels; choose another model.width"
            )
        return width // self.size

    def vector(self, width: int) -> nn.Parameter:
        """One parameter for each channel of this part."""
        parameter = super().vector(self.channels(width))
        shards.mark_sharded(parameter, 0, width)
        return parameter

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """A projection to this part's outputs."""
        from spikescale.parallel.layers import ColumnLinear

        self.channels(out_features)
        return ColumnLinear(in_features, out_features, self.group)

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """A projection of this part's inputs, summed over the group."""
        from spikescale.parallel.layers import RowLinear

        self.channels(in_features)
        return RowLinear(in_features, out_features, self.group)

    def head(self, width: int, vocab_size: int) -> nn.Module:
        """A projection to the logits of this part of the padded vocabulary."""
        head = self.column(width, padded_length(vocab_size, self.size))
        shards.mark_sharded(cast(Tensor, head.weight), 0, vocab_size)
        return head

    def embedding(self, vocab_size: int, width: int, binary: bool, neuron: NeuronConfig) -> nn.Module:
        """A table with this part's rows."""
        from spikescale.parallel.layers import VocabEmbedding

        padded = padded_length(vocab_size, self.size)
        return VocabEmbedding(padded, vocab_size, width, binary, neuron, self.group)

    def enter(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors; their gradients are summed over the group."""
        return regions.enter(self.group, *tensors)

    def gather(self, x: Tensor) -> Tensor:
        """The channels of all parts side by side."""
        return regions.gather(x, self.group)

    def full_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The parameter's shape in the whole model."""
        return shards.full_shape(parameter)

    def local_slice(self, full: Tensor, parameter: Tensor) -> Tensor:
        """What of `full` is here, zeros for padding."""
        return shards.local_slice(full, parameter, self.rank, self.size)

    def loss(self, logits: Tensor, targets: Tensor, regulariser: float) -> tuple[Tensor, Tensor]:
        """`language_model_loss` without gathering the logits, which may be overwritten."""
        return vocab_language_model_loss(logits, targets, regulariser, self.vocab_size, self.group)

    def token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target (N,) under this part's logits (N, n), which may be overwritten."""
        return vocab_token_losses(logits, targets, self.vocab_size, self.group)

    def whole_logits(self, model: SpikeGPT) -> Any:
        """The model with its logits gathered; all ranks of the group call it together."""
        return WholeLogits(model)


class WholeLogits(nn.Module):
    """A divided model that returns the logits of the whole vocabulary: for generation."""

    def __init__(self, model: SpikeGPT) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.training = model.training

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, T) int64 -> logits (B, T, V), the same on all ranks, and this rank's new state."""
        logits, state = self.model(tokens, state)
        return self.model.parts.gather(logits)[..., : self.config.vocab_size], state


def padded_length(vocab_size: int, size: int) -> int:
    """The next multiple of `size`."""
    return -(-vocab_size // size) * size


def tensor_parts(layout: Layout, model: ModelConfig) -> Parts:
    """What this rank holds of a model: all of it, unless the layout divides tensors. Collective.

    Starts megatron-core's groups. Raises UserError for a width that cannot be divided.
    """
    if layout.tensor == 1:
        return Parts()
    if model.width % layout.tensor:
        raise UserError(f"parallel.tensor = {layout.tensor} does not divide model.width = {model.width}")
    assert model.vocab_size is not None
    return TensorParts(_groups(layout).tensor_group, model.vocab_size)


def model_parallel_unit(layout: Layout) -> ModelParallelUnit | None:
    """What DeepSpeed must be given as `mpu`; None where tensors are not divided."""
    return None if layout.tensor == 1 else _groups(layout)


def _groups(layout: Layout) -> ModelParallelUnit:
    """megatron-core's groups for this layout, started by the first call."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        # Its gloo twins of groups would carry optimizer state that is DeepSpeed's here.
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor, create_gloo_process_groups=False
        )
    unit = ModelParallelUnit(
        parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
    )
    found = (unit.get_model_parallel_rank(), unit.get_model_parallel_world_size())
    if found != (layout.tensor_rank, layout.tensor):
        raise UserError(
            f"parallel.tensor = {layout.tensor}: megatron-core has groups of {found[1]} rank(s) from before;"
            " one process trains with one layout"
        )
    return unit
