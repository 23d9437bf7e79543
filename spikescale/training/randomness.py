"""The random generators that training may draw from."""

import random

import numpy as np
import torch


def seed_everything(seed: int, index: int, step: int | None = None) -> None:
    """Seed the generators, differently for each `index` so that dropout masks differ.

    index: the rank, or its place among the ranks that draw differently. step: where a run continues
    whose generators' states do not fit its ranks; None at the start of a run.
    """
    entropy = [seed, index] if step is None else [seed, index, step]
    mixed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def random_state() -> dict[str, torch.Tensor]:
    """The state of every random generator that training may draw from, as uint8 tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
