"""Which part of the work each rank does."""

from dataclasses import dataclass

from spikescale.config import ParallelConfig
from spikescale.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The place of one rank in the grid data x context x tensor (the last index is the fastest).

    Ranks of one tensor group read the same tokens and hold different channels; ranks of one context
    group hold the same weights and read successive parts of the same sequences; ranks that differ in
    the data index alone read different sequences.
    """

    rank: int
    world_size: int
    tensor: int = 1
    context: int = 1

    @classmethod
    def of(cls, config: ParallelConfig, rank: int, world_size: int) -> "Layout":
        """The layout that the settings ask for. Raises UserError when the ranks do not divide."""
        group = config.tensor * config.context
        if world_size % group:
            name = "parallel.tensor" if config.tensor > 1 else "parallel.context"
            raise UserError(
                f"{name} = {group}: does not divide the {world_size} rank(s); start a multiple of {group}"
            )
        return cls(rank, world_size, config.tensor, config.context)

    @property
    def data(self) -> int:
        """Parts that the batch is divided into."""
        return self.world_size // (self.tensor * self.context)

    @property
    def tensor_rank(self) -> int:
        """Which part of the channels is here."""
        return self.rank % self.tensor

    @property
    def context_rank(self) -> int:
        """Which part of each sequence is read here."""
        return self.rank // self.tensor % self.context

    @property
    def data_rank(self) -> int:
        """Which part of the batch is read here."""
        return self.rank // (self.tensor * self.context)

    def tensor_groups(self) -> list[list[int]]:
        """The ranks of every tensor group."""
        return [list(range(first, first + self.tensor)) for first in range(0, self.world_size, self.tensor)]

    def context_groups(self) -> list[list[int]]:
        """The ranks of every context group, in the order of the sequence."""
        size = self.tensor * self.context
        return [
            [first + part * self.tensor + index for part in range(self.context)]
            for first in range(0, self.world_size, size)
            for index in range(self.tensor)
        ]

    def replica_groups(self) -> list[list[int]]:
        """The groups of ranks that hold the same weights: gradients are averaged over each."""
        return [list(range(index, self.world_size, self.tensor)) for index in range(self.tensor)]
