"""LAMBADA: how often, and with what perplexity, a model guesses the last word of a passage.

The usual definition (Paperno et al. 2016, as evaluated since GPT-2): the passage without its last word is
read, the word with the space before it is scored. Accuracy: the share of passages whose last word is what
greedy decoding says. Perplexity: exp of the mean over passages of the word's negative log-probability.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer
    from spikescale.evaluation.scoring import Scorer


@dataclass(frozen=True)
class LastWordResult:
    """Accuracy (0 to 1) and perplexity, with the standard error of the accuracy."""

    last_word_accuracy: float
    last_word_accuracy_error: float
    last_word_perplexity: float
    passages: int
    tokens: int  # of all last words

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


def evaluate_last_word(
    scorer: "Scorer",
    tokenizer: "Tokenizer",
    passages: Iterable[str],
    progress: Callable[[int], None] | None = None,
) -> LastWordResult:
    """Score the last word of each passage. Raises UserError for one without two words, or for none."""
    requests = [split_ids(tokenizer, *last_word(passage)) for passage in passages]
    if not requests:
        raise UserError("no passages to evaluate")
    scores = scorer.score(requests, progress)
    count = len(scores)
    accuracy = sum(score.is_greedy for score in scores) / count
    nats = -sum(score.log_probability for score in scores) / count
    return LastWordResult(
        last_word_accuracy=accuracy,
        last_word_accuracy_error=math.sqrt(accuracy * (1 - accuracy) / (count - 1))
        if count > 1
        else math.nan,
        last_word_perplexity=math.exp(nats) if nats < 700 else math.inf,
        passages=count,
        tokens=sum(len(continuation) for _, continuation in requests),
    )


def last_word(passage: str) -> tuple[str, str]:
    """A passage without its last word, and that word with the space before it. Raises UserError."""
    context, space, word = passage.rstrip().rpartition(" ")
    if not context.strip():
        raise UserError(f"passage {passage[:40]!r}: has no words before its last one")
    return context, space + word


def split_ids(tokenizer: "Tokenizer", context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it, where the text is encoded as a whole.

    Spaces at the end of the context belong to what follows, as in lm-evaluation-harness: tokenizers join them
    to the next word.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = [int(token) for token in tokenizer.encode(stripped + continuation)]
    length = len(tokenizer.encode(stripped))
    return whole[:length], whole[length:]
