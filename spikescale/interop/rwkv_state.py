"""The recurrent state of the variant rwkv, as transformers' RwkvForCausalLM keeps it and back."""

import torch
from torch import Tensor

from spikescale.model.state import State

# transformers keeps five tensors (B, C, L): inputs of the two token shifts, then WKV's three rows.
_SHIFTS = ("channel_mix.shift", "time_mix.shift")
_WKV = "time_mix.wkv"


def to_hf_state(state: State) -> list[Tensor]:
    """The five tensors (B, C, L) that RwkvForCausalLM takes as `state`.

    WKV's sums are a e^m and b e^m: two programs that read the same text may split them differently.

    Raises ValueError for the state of a variant with neurons, for which there is no place.
    """
    for block in state:
        if extra := sorted(block.keys() - {*_SHIFTS, _WKV}):
            raise ValueError(f"{extra[0]}: RWKV-4 has no membranes, its state cannot hold this one")
    shifts = [torch.stack([block[key] for block in state], dim=2) for key in _SHIFTS]
    rows = [torch.stack([block[_WKV][:, row] for block in state], dim=2) for row in range(3)]
    return shifts + rows


def from_hf_state(state: list[Tensor]) -> State:
    """Our state of what RwkvForCausalLM returned."""
    blocks: State = []
    for layer in range(state[0].shape[2]):
        channel, time, *rows = (tensor[:, :, layer].float() for tensor in state)
        blocks.append({"channel_mix.shift": channel, "time_mix.shift": time, _WKV: torch.stack(rows, dim=1)})
    return blocks
