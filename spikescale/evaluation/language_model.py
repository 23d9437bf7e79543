"""Loss of a language model over a split, each token scored exactly once.

Windows of `context_length` inputs advance by `stride` tokens. The first window scores all its tokens,
each later one only those that the windows before it did not reach: with stride = context_length the
windows are disjoint; the smaller the stride, the longer the shortest context, and the cost grows by
context_length / stride. The first token of the split is predicted from EOS.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.model import SpikeGPT


COUNTED_AT_ONCE = 1 << 22

# Nats of each target (N,) under its row of logits (N, ...), which may be overwritten; float32 (N,).
TokenLosses = Callable[[Tensor, Tensor], Tensor]


class TokenSequence(Protocol):
    """The tokens of a split, one after another: `tokens[a:b]` is an int64 array."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> NDArray[np.int64]: ...


class Window(NamedTuple):
    """Inputs for the predictions of tokens [start, start + length), of which the last `scored` count."""

    start: int
    length: int
    scored: int


@dataclass(frozen=True)
class LanguageModelResult:
    """The loss in the units of the field. `bytes` and `characters` are those of the scored text.

    The end of each document is a token, is predicted and paid for like any other, and adds neither a
    byte nor a character.
    """

    loss: float  # nats a token
    perplexity: float
    bits_per_byte: float
    bits_per_character: float
    tokens: int
    bytes: float
    characters: float

    @classmethod
    def from_sum(
        cls,
        nats: float,
        tokens: int,
        *,
        split_tokens: int,
        split_bytes: float,
        split_characters: float,
        conditions: int = 0,
    ) -> "LanguageModelResult":
        """From the summed loss of `tokens` tokens of a split with the given totals.

        `conditions` of the tokens were read, not predicted: they are left out of the loss per token. When
        only a part of the split was scored, its bytes and characters are estimated by the split's
        averages per token; over the whole split they are exact.
        """
        share = tokens / split_tokens
        scored_bytes, scored_characters = split_bytes * share, split_characters * share
        tokens -= conditions
        loss = nats / tokens
        bits = nats / math.log(2)
        return cls(
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            bits_per_byte=bits / scored_bytes if scored_bytes else math.nan,
            bits_per_character=bits / scored_characters if scored_characters else math.nan,
            tokens=tokens,
            bytes=scored_bytes,
            characters=scored_characters,
        )

    @classmethod
    def weighted(cls, parts: "Sequence[tuple[LanguageModelResult, float]]") -> "LanguageModelResult":
        """The mean over texts that weigh as much as their shares of the tokens, which add up to 1.

        Of the counts of tokens, bytes and characters, the first is what was scored and the others are in
        proportion to it.
        """
        if len(parts) == 1:
            return parts[0][0]
        tokens = sum(result.tokens for result, _ in parts)
        size, characters = (
            sum(share * amount(result) / result.tokens for result, share in parts) * tokens
            for amount in (lambda result: result.bytes, lambda result: result.characters)
        )
        nats = sum(share * result.loss for result, share in parts) * tokens
        return cls.from_sum(nats, tokens, split_tokens=tokens, split_bytes=size, split_characters=characters)

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


def windows(count: int, context_length: int, stride: int, full_last: bool = False) -> Iterator[Window]:
    """Windows that score each of `count` tokens once; all but the last have `context_length` inputs.

    `full_last`: the last one begins earlier, so that it has as many, where there are.
    """
    done = 0
    for start in range(0, count, stride):
        end = min(start + context_length, count)
        if full_last:
            start = max(0, end - context_length)
        yield Window(start, end - start, end - done)
        done = end
        if done == count:
            return


@torch.no_grad()
def evaluate_tokens(
    model: "SpikeGPT",
    tokens: TokenSequence,
    *,
    context_length: int,
    stride: int | None = None,
    batch_size: int = 8,
    eos_id: int,
    limit: int | None = None,
    autocast: torch.dtype | None = None,
    carry_state: bool = False,
    progress: Callable[[int], None] | None = None,
    text_ids: int | None = None,
    full_last: bool = False,
) -> tuple[float, int]:
    """The loss summed over `tokens`, in nats, and the number of tokens that it covers.

    Tokens from `text_ids` on (conditions in front of a document) are read and cost nothing; they count as
    covered. `stride` (default: `context_length`) is at most `context_length`. `limit` keeps to the first
    tokens. `full_last`: the last window has as many inputs as the others, where there are as many.
    `autocast`: the dtype of torch.autocast, for example bfloat16; the loss itself is computed in float32
    and summed in float64. `carry_state` reads everything in one pass, `context_length` tokens at a
    time, handing the recurrent state on: each token has all those before it as context, and neither
    `stride` nor `batch_size` nor `full_last` plays a part. `progress` is called with the number of tokens
    newly scored.
    The model is left in the mode it was in. Raises UserError for a length out of range or no tokens.
    """
    stride = context_length if stride is None else stride
    count = len(tokens) if limit is None else min(limit, len(tokens))
    if context_length < 1 or batch_size < 1:
        raise UserError(f"context_length {context_length}, batch_size {batch_size}: both must be 1 or more")
    if not 1 <= stride <= context_length:
        raise UserError(f"stride {stride}: must be from 1 to the context length, {context_length}")
    if count < 1:
        raise UserError("no tokens to evaluate: the split is empty or the limit is 0")
    device = next(model.parameters()).device
    total = 0.0
    state = None
    was_training = model.training
    model.eval()
    try:
        if carry_state:
            # Each token is read once: a last window that began earlier would read its beginning twice.
            stride, batch_size, full_last = context_length, 1, False
        for batch in batches_of_windows(windows(count, context_length, stride, full_last), batch_size):
            inputs, targets = inputs_and_targets(tokens, batch, eos_id)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                inputs = inputs.to(device)
                logits, new_state = model(inputs, state, **document_resets(model, inputs, eos_id))
            if carry_state:
                state = new_state
            total += summed_loss(logits, targets.to(device), batch[0].scored, text_ids=text_ids)
            if progress is not None:
                progress(len(batch) * batch[0].scored)
    finally:
        model.train(was_training)
    return total, count


def document_resets(model: Any, inputs: Tensor, eos_id: int) -> dict[str, Tensor]:
    """The argument by which a model that clears its state between documents is told where to; else none."""
    config = getattr(model, "config", None)
    return {"reset": inputs == eos_id} if config is not None and config.reset_at_documents else {}


def batches_of_windows(ordered: Iterator[Window], batch_size: int) -> Iterator[list[Window]]:
    """Windows that follow one another and have the same shape, up to `batch_size` together."""
    for _, group in groupby(ordered, key=lambda window: window[1:]):
        while batch := list(islice(group, batch_size)):
            yield batch


def inputs_and_targets(tokens: TokenSequence, batch: list[Window], eos_id: int) -> tuple[Tensor, Tensor]:
    """Two tensors (B, T), int64: for each window its tokens, and before each of them the one it follows."""
    rows = []
    for start, length, _ in batch:
        row = np.asarray(tokens[max(start - 1, 0) : start + length], dtype=np.int64)
        rows.append(row if start else np.concatenate(([eos_id], row)))
    stacked = torch.from_numpy(np.stack(rows))
    return stacked[:, :-1], stacked[:, 1:]


def whole_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """`TokenLosses` of logits (N, V) of the whole vocabulary."""
    return cross_entropy(logits.float(), targets, reduction="none")


def summed_loss(
    logits: Tensor,
    targets: Tensor,
    scored: int,
    token_losses: TokenLosses = whole_token_losses,
    text_ids: int | None = None,
) -> float:
    """Nats of the last `scored` positions; `logits` (B, T, V), `targets` (B, T).

    Targets from `text_ids` on cost nothing.
    """
    # Row by row: in float32, a large vocabulary's log-probabilities of a whole batch take gigabytes.
    rows = zip(logits[:, -scored:], targets[:, -scored:], strict=True)
    losses = []
    for row, target in rows:
        nats = token_losses(row, target)
        if text_ids is not None:
            nats = nats.masked_fill(target >= text_ids, 0.0)
        losses.append(nats.sum(dtype=torch.float64))
    return float(torch.stack(losses).sum())


def count_conditions(tokens: TokenSequence, text_ids: int, limit: int | None = None) -> int:
    """How many of the first `limit` tokens are ids from `text_ids` on."""
    count = len(tokens) if limit is None else min(limit, len(tokens))
    blocks = range(0, count, COUNTED_AT_ONCE)
    return sum(
        int(np.count_nonzero(tokens[begin : min(begin + COUNTED_AT_ONCE, count)] >= text_ids))
        for begin in blocks
    )
