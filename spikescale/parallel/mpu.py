"""What DeepSpeed is told of the groups of ranks (its `mpu`), and proof that it listens.

Without it DeepSpeed averages the gradients of different channels with one another, and says nothing.
"""

from typing import Any

import torch

from spikescale.errors import UserError
from spikescale.parallel.layout import Layout


class ModelParallelUnit:
    """The tensor and data groups under the names that DeepSpeed looks for.

    `tensor_group` holds the parts of one model, `data_group` the ranks with the same part.
    """

    def __init__(self, tensor_group: Any, data_group: Any) -> None:
        self.tensor_group, self.data_group = tensor_group, data_group

    def get_model_parallel_world_size(self) -> int:
        """Parts of the model."""
        return int(torch.distributed.get_world_size(self.tensor_group))

    def get_model_parallel_rank(self) -> int:
        """Which part is here."""
        return int(torch.distributed.get_rank(self.tensor_group))

    def get_model_parallel_group(self) -> Any:
        """The ranks that hold the parts of this model."""
        return self.tensor_group

    def get_tensor_model_parallel_world_size(self) -> int:
        """Parts of the model: nothing but its tensors is divided."""
        return self.get_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        """Which part is here."""
        return self.get_model_parallel_rank()

    def get_tensor_model_parallel_group(self) -> Any:
        """The ranks that hold the parts of this model."""
        return self.tensor_group

    def get_data_parallel_world_size(self) -> int:
        """Ranks over which gradients are averaged and the optimizer is sharded."""
        return int(torch.distributed.get_world_size(self.data_group))

    def get_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return int(torch.distributed.get_rank(self.data_group))

    def get_data_parallel_group(self) -> Any:
        """The ranks over which gradients are averaged."""
        return self.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their numbers in the world."""
        return list(torch.distributed.get_process_group_ranks(self.data_group))


def require_groups(engine: Any, layout: Layout) -> None:
    """Raise UserError unless a DeepSpeed engine shards and averages over the groups of `layout`."""
    replicas = layout.world_size // layout.tensor
    sizes = {"averages gradients over": int(engine.dp_world_size)}
    process_groups = getattr(engine.optimizer, "real_dp_process_group", None)  # of ZeRO 1 and 2
    for group in process_groups or []:
        sizes["shards the optimizer over"] = int(torch.distributed.get_world_size(group))
    for what, size in sizes.items():
        if size != replicas:
            raise UserError(
                f"parallel.tensor = {layout.tensor}: DeepSpeed {what} {size} rank(s), and {replicas} hold the"
                " same channels: it was not given the groups (mpu), or does not use them"
            )
    if int(engine.mp_world_size) != layout.tensor:
        raise UserError(
            f"parallel.tensor = {layout.tensor}: DeepSpeed knows of {int(engine.mp_world_size)} part(s) of"
            " the model and would clip gradients by the norm of one: it was not given the groups (mpu)"
        )
