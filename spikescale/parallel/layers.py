"""megatron-core's parallel layers, as the model calls its own: one tensor in, one tensor out.

Imported only where a model is divided, because importing megatron-core takes seconds.
"""

from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor

from spikescale.config.schema import NeuronConfig
from spikescale.model.neuron import Heaviside, NoNeuron
from spikescale.model.time_mix import projection_dtype
from spikescale.parallel.shards import mark_sharded


def _settings(size: int) -> ModelParallelConfig:
    # Values come from the model's own initialisation, which depends on the parameter's name alone.
    return ModelParallelConfig(
        tensor_model_parallel_size=size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.get_default_dtype(),
    )


def _no_values(weight: Tensor) -> None:
    raise AssertionError("megatron-core was told not to initialise weights")


class _Autocast:
    """Multiplies in autocast's dtype, which megatron-core's matrix product does not look at in backward."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
        dtype = projection_dtype(input)
        with torch.autocast(input.device.type, enabled=False):
            return super()._forward_impl(input.to(dtype), weight.to(dtype), *args, **kwargs)  # type: ignore[misc]


class ColumnLinear(_Autocast, ColumnParallelLinear):
    """Whole input (..., in_features) -> this rank's out_features / size outputs.

    The gradient of the input is this rank's contribution: `regions.enter` sums it.
    """

    def __init__(self, in_features: int, out_features: int, group: Any) -> None:
        super().__init__(
            in_features,
            out_features,
            config=_settings(group.size()),
            init_method=_no_values,
            bias=False,
            gather_output=False,
            disable_grad_reduce=True,
            tp_group=group,
        )
        mark_sharded(self.weight, 0, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features / size)."""
        return super().forward(x)[0]


class RowLinear(_Autocast, RowParallelLinear):
    """This rank's in_features / size inputs -> whole output, summed over the group."""

    def __init__(self, in_features: int, out_features: int, group: Any) -> None:
        super().__init__(
            in_features,
            out_features,
            config=_settings(group.size()),
            init_method=_no_values,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )
        mark_sharded(self.weight, 1, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features / size) -> (..., out_features), the same on all ranks of the group."""
        return super().forward(x)[0]


class VocabEmbedding(VocabParallelEmbedding):
    """`spikescale.model.embedding.Embedding` with the table's rows divided over the group."""

    def __init__(
        self, padded: int, vocab_size: int, width: int, binary: bool, neuron: NeuronConfig, group: Any
    ) -> None:
        super().__init__(
            padded, width, init_method=_no_values, config=_settings(group.size()), tp_group=group
        )
        mark_sharded(self.weight, 0, vocab_size)
        self.neuron = Heaviside(neuron) if binary else NoNeuron()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> (B, T, width) in the table's dtype, the same on all ranks of the group."""
        x, _ = self.neuron(super().forward(tokens), None, None)
        return x
