"""The batches of a run, read one step ahead: ranks agree on a failure before they depend on one another."""

from typing import Any

import torch

from spikescale.data_pipeline.loader import Loader
from spikescale.errors import UserError


class Feed:
    """A rank's batches, the next one already read; `failed` once it could not be.

    Its state is the position of the next batch that `take` gives.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.error: UserError | None = None
        self.number = 0  # of the batch taken last, counted from 1 along the data
        self.first = 0  # its first sample, over all ranks
        self._next: list[torch.Tensor] | None = None

    @property
    def failed(self) -> bool:
        """Whether the next batch cannot be read on this rank."""
        return self.error is not None

    def read_ahead(self) -> None:
        """Read the next batch, if that is not done; what goes wrong is kept for `check`."""
        if self._next is None and self.error is None:
            try:
                self._next = next(self.loader)
            except UserError as error:
                self.error = error

    def ready(self, seconds: float) -> bool:
        """Whether `read_ahead` would not have to wait; waits so long at most."""
        return self._next is not None or self.error is not None or self.loader.ready(seconds)

    def check(self) -> None:
        """Raise the UserError for which the next batch could not be read, if it could not."""
        if self.error is not None:
            raise self.error

    def take(self) -> list[torch.Tensor]:
        """This rank's part of the next step: tensors (micro_batch_size, T + 1), int64. Raises UserError."""
        self.read_ahead()
        self.check()
        self.number = self.loader.samples // self.loader.batch_size
        self.first = self.loader.samples - self.loader.batch_size
        batch, self._next = self._next, None
        assert batch is not None
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, with what it refers to: the loader's, without the batch read ahead."""
        return self.loader.state_dict(behind=0 if self._next is None else 1)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position. Raises UserError when data or order differ."""
        self._next, self.error = None, None
        self.loader.load_state_dict(state)

    def close(self) -> None:
        """Stop reading."""
        self.loader.close()
