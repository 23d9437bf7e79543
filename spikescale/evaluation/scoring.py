"""Log-likelihoods of continuations after contexts, exactly, in batches, with what contexts share read once.

Contexts are sorted, so that those with a beginning in common stand together. Where most of what a batch reads
is such a beginning (examples in front of each question), it is read once and each rest goes on from there.
Otherwise contexts are padded at their left, and the padding is cut off by a reset of the state in front of
the first token, so that each row ends in the state of its own context. The continuations of a context go on
from that state, padded at their right, where a causal model cannot see it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spikescale.evaluation.language_model import document_resets

if TYPE_CHECKING:
    from spikescale.model import SpikeGPT
    from spikescale.model.state import State

CHUNK = 256  # tokens of a context read at a time: bounds the logits that are held

Ids = tuple[int, ...]


class Score(NamedTuple):
    """Of a continuation: its log-probability in nats, and whether greedy decoding would produce it."""

    log_probability: float
    is_greedy: bool


@dataclass
class Read:
    """What contexts leave behind: the model's state and the logits (B, V) of what comes next."""

    state: "State"
    logits: Tensor


class Scorer:
    """Scores continuations with one model.

    Args:
        model: in evaluation mode.
        eos_id: stands in front of everything, as at the start of a document.
        vocab_size: ids from it on, which pad a model beyond its tokenizer, have no probability.
        batch_size: contexts, and continuations, computed together.
        window: the last tokens of context and continuation that are read, as by a model with a limited
            context; None: all of them, however long.

    `tokens_read` counts what the model has computed, padding included.
    """

    def __init__(
        self,
        model: "SpikeGPT",
        eos_id: int,
        vocab_size: int,
        batch_size: int = 8,
        window: int | None = None,
    ) -> None:
        self.model, self.eos_id, self.vocab_size = model, eos_id, vocab_size
        self.batch_size, self.window = batch_size, window
        self.tokens_read = 0

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """The score of each (context, continuation), ids of text; an empty context is that of a document.

        `progress` is called with the number of requests newly scored.
        """
        groups: dict[Ids, list[int]] = {}
        found: list[Score] = [Score(0.0, True)] * len(requests)
        for index, (context, continuation) in enumerate(requests):
            if continuation:
                groups.setdefault(self._context(context, len(continuation)), []).append(index)
        done = len(requests) - sum(map(len, groups.values()))
        if progress is not None and done:
            progress(done)
        for contexts in batches(sorted(groups), self.batch_size):
            read = self.read(contexts)
            # Row by row: (row of the batch of contexts, request).
            pairs = [(row, index) for row, context in enumerate(contexts) for index in groups[context]]
            pairs.sort(key=lambda pair: len(requests[pair[1]][1]))
            for chosen in batches(pairs, self.batch_size):
                rows = [row for row, _ in chosen]
                continuations = [requests[index][1] for _, index in chosen]
                for (_, index), score in zip(chosen, self._continue(read, rows, continuations), strict=True):
                    found[index] = score
                if progress is not None:
                    progress(len(chosen))
        return found

    @torch.no_grad()
    def read(self, contexts: Sequence[Ids]) -> Read:
        """Read contexts, each with the end of a document in front, that need not be equally long."""
        shared = _common_prefix(contexts)
        rests = [context[shared:] for context in contexts]
        # Rests of different lengths cannot be padded after a state that they are to go on from, so they are
        # read apart: worth it where the beginning is most of the work.
        if shared * (len(contexts) - 1) > sum(map(len, rests)):
            return self._in_lengths(rests, self._advance(torch.tensor([contexts[0][:shared]]), None, None))
        longest = max(map(len, contexts))
        tokens = torch.full((len(contexts), longest), self.eos_id)
        reset = torch.zeros(len(contexts), longest, dtype=torch.bool)
        for row, context in enumerate(contexts):
            tokens[row, longest - len(context) :] = torch.tensor(context)
            reset[row, longest - len(context)] = True
        return self._advance(tokens, None, reset)

    def _in_lengths(self, rests: Sequence[Ids], read: Read) -> Read:
        """`read`, of one row, continued by each of `rests`."""
        states: list[State] = [[] for _ in rests]
        logits: list[Tensor] = [read.logits[0]] * len(rests)
        for length in sorted({len(rest) for rest in rests}):
            rows = [row for row, rest in enumerate(rests) if len(rest) == length]
            state = select(read.state, [0] * len(rows))
            if length:
                tokens = torch.tensor([rests[row] for row in rows])
                grown = self._advance(tokens, state, None)
            else:
                grown = Read(state, read.logits.expand(len(rows), -1))
            for place, row in enumerate(rows):
                states[row] = select(grown.state, [place])
                logits[row] = grown.logits[place]
        joined = [
            {key: torch.cat([state[block][key] for state in states]) for key in entries}
            for block, entries in enumerate(states[0])
        ]
        return Read(joined, torch.stack(logits))

    def _context(self, context: Sequence[int], continuation: int) -> Ids:
        ids = (self.eos_id, *map(int, context))
        if self.window is None:
            return ids
        # The last token of a continuation is predicted and not read.
        return ids[-max(1, self.window - continuation + 1) :]

    def _advance(self, tokens: Tensor, state: "State | None", reset: Tensor | None) -> Read:
        device = next(self.model.parameters()).device
        last = torch.empty(0)
        for begin in range(0, tokens.shape[1], CHUNK):
            chunk = tokens[:, begin : begin + CHUNK].to(device)
            resets = document_resets(self.model, chunk, self.eos_id)
            if reset is not None:
                part = reset[:, begin : begin + CHUNK].to(device)
                resets["reset"] = resets["reset"] | part if resets else part
            logits, state = self.model(chunk, state, **resets)
            last = logits[:, -1]
            self.tokens_read += chunk.numel()
        assert state is not None
        return Read(state, last[:, : self.vocab_size])

    def _continue(self, read: Read, rows: list[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        longest = max(map(len, continuations))
        device = read.logits.device
        targets = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
        for row, ids in enumerate(continuations):
            targets[row, : len(ids)] = torch.tensor(list(ids), device=device)
        logits = read.logits[rows][:, None]
        if longest > 1:
            inputs = targets[:, :-1]
            resets = document_resets(self.model, inputs, self.eos_id)
            more, _ = self.model(inputs, select(read.state, rows), **resets)
            self.tokens_read += inputs.numel()
            logits = torch.cat([logits, more[..., : self.vocab_size]], dim=1)
        scores = []
        for row, ids in enumerate(continuations):
            own = logits[row, : len(ids)].float().log_softmax(-1)
            wanted = targets[row, : len(ids)]
            total = own.gather(-1, wanted[:, None]).sum(dtype=torch.float64)
            scores.append(Score(float(total), bool((own.argmax(-1) == wanted).all())))
        return scores


def select(state: "State", rows: Sequence[int]) -> "State":
    """The state of these rows of a batch."""
    return [{key: tensor[list(rows)] for key, tensor in block.items()} for block in state]


def batches(items: Sequence[tuple], size: int) -> Iterator[Sequence[tuple]]:
    """Up to `size` items at a time, in order."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _common_prefix(contexts: Sequence[Ids]) -> int:
    """How many tokens all contexts of a sorted list begin with: those that the first and last one do."""
    pairs = zip(contexts[0], contexts[-1], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
