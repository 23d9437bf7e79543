"""The recurrent state where transformers expects a cache of keys and values."""

import torch
from torch import Tensor

from spikescale.model.state import State


class RecurrentCache:
    """What has been read so far, of constant size: passed and returned as `past_key_values`.

    `generate` reorders it between beams. It cannot be cropped: a state does not forget its last tokens.

    Attributes:
        state: the model's; None before the first token.
        seen: tokens read, padding included.
    """

    is_compileable = False
    is_sliding = ()

    def __init__(self) -> None:
        self.state: State | None = None
        self.seen = 0

    def update_state(self, state: State, tokens: int) -> None:
        """Take the state after `tokens` more."""
        self.state = state
        self.seen += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, padding included."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in this order."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.state is not None:
            rows = next(iter(self.state[0].values())).shape[0]
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Refused: raises ValueError unless nothing would be cropped."""
        if max_length < 0 or max_length < self.seen:
            raise ValueError("a recurrent state cannot be cropped: it does not forget its last tokens")

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = [
                {key: tensor.index_select(0, rows.to(tensor.device)) for key, tensor in block.items()}
                for block in self.state
            ]
