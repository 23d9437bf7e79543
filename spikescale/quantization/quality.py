"""What eight bits cost: the loss on a text, and how many spikes and predictions they change."""

import math
from typing import Any

import torch
from torch import Tensor

from spikescale.inference.reading import batches, reading_progress
from spikescale.model.spikegpt import SpikeGPT
from spikescale.model.store import LoadedModel

BATCH = 8


def compare(source: LoadedModel, made: LoadedModel, tokens: Tensor) -> dict[str, Any]:
    """Bits a token of both models over a text, and what differs.

    The text is cut into windows of `context_length` + 1 tokens (the last one may be shorter), each read with
    an empty state. The first token of every window is read and not scored: `tokens scored` leaves them out.
    """
    length = source.config.context_length
    nats, other, changed, spikes, flipped = 0.0, 0.0, 0, 0, 0
    with reading_progress("scoring", len(tokens)) as progress, torch.no_grad():
        for windows in batches(tokens, length + 1, BATCH):
            if windows.shape[1] < 2:
                break  # a last token alone, which nothing predicts
            before, fired = _read(source.model, windows[:, :-1])
            after, refired = _read(made.model, windows[:, :-1])
            targets = windows[:, 1:].flatten()
            nats += float(torch.nn.functional.cross_entropy(before, targets, reduction="sum"))
            other += float(torch.nn.functional.cross_entropy(after, targets, reduction="sum"))
            changed += int((before.argmax(-1) != after.argmax(-1)).sum())
            for name, one in fired.items():
                spikes += one.numel()
                flipped += int((one != refired[name]).sum())
            progress(windows.numel())
    scored = _scored(len(tokens), length + 1)
    result: dict[str, Any] = {
        "tokens scored": scored,
        "float32 bits a token": nats / scored / math.log(2),
        "int8 bits a token": other / scored / math.log(2),
        "predictions changed": changed / scored,
    }
    if spikes:
        result["spikes changed"] = flipped / spikes
    return result


def _scored(tokens: int, window: int) -> int:
    rest = tokens % window
    return tokens // window * (window - 1) + max(rest - 1, 0)


def _read(model: SpikeGPT, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (N, V), and the spikes of the neurons in the blocks by name."""
    fired: dict[str, Tensor] = {}
    hooks = [
        neuron.register_forward_hook(lambda _, __, out, name=name: fired.__setitem__(name, out[0]))
        for name, neuron in model.neurons()
        if name.startswith("blocks.")
    ]
    try:
        logits, _ = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return logits.float().flatten(0, 1), fired
