"""A text of the user's as tokens, and the progress of a model that reads it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer


def read_tokens(path: Path, tokenizer: "Tokenizer", limit: int | None = None) -> Tensor:
    """The first `limit` (None: all) tokens of a UTF-8 file, (N,) int64, after the end-of-document id.

    Raises UserError for a file that cannot be read, is empty, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: must be 1 or more")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: cannot be read ({error})") from None
    if not text.strip():
        raise UserError(f"--text {path}: holds no text")
    ids = torch.tensor([tokenizer.eos_id, *map(int, tokenizer.encode(text))], dtype=torch.long)
    return ids if limit is None else ids[:limit]


def batches(tokens: Tensor, context_length: int, batch_size: int) -> Iterator[Tensor]:
    """(B, T) windows of a text that follow one another; the last one alone and shorter, if need be."""
    whole = len(tokens) // context_length * context_length
    yield from tokens[:whole].view(-1, context_length).split(batch_size)
    if whole < len(tokens):
        yield tokens[None, whole:]


@contextlib.contextmanager
def reading_progress(what: str, tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time that is left, on a terminal's standard error; yields what counts tokens read."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=tokens)
        yield lambda read: bar.advance(task, read)
