"""Dropping one update, as if its step had not been: no weight, moment or count of Adam's steps changes.

At ZeRO stages 1 to 3 DeepSpeed drops an update by itself when the norm of the whole gradient, which all ranks
compute together, is not finite: it frees the gradients on every rank and leaves the optimizer alone. The same
way serves for an update that we do not want: it is shown a norm that is infinite. At stage 0 it has no such
way: there an optimizer without gradients does nothing, and clipping, which fails without them, is left out.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def discarded(engine: Any) -> Iterator[None]:
    """Within the block, the `engine.step()` that ends an optimizer step drops its gradients.

    Every rank must enter it for the same step.
    """
    stage = engine.zero_optimization_stage()
    infinite = torch.full((), math.inf, device=engine.device)
    if stage == 0:
        for parameter in engine.module.parameters():
            parameter.grad = None
        replaced = _replaced(engine, "clip_fp32_gradients", lambda: None)
    elif stage == 3:
        replaced = _replaced(engine.optimizer, "_get_norm_groups", lambda: [infinite])
    else:
        replaced = _replaced(engine.optimizer, "scaled_global_norm", lambda norm_type=2: infinite)
    with replaced:
        yield


@contextlib.contextmanager
def _replaced(thing: Any, method: str, other: Callable[..., Any]) -> Iterator[None]:
    # An attribute of the object covers the method of its class until it is deleted.
    setattr(thing, method, other)
    try:
        yield
    finally:
        delattr(thing, method)


def was_dropped(engine: Any) -> bool:
    """Whether DeepSpeed dropped the last update as not finite (stages 1 to 3), alike on all ranks."""
    return bool(engine.zero_optimization_stage() and engine.optimizer.overflow)
