"""Where the time of preparing goes: seconds a stage, added up in the process that does the work."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

STAGES = ("reading", "tokenising", "writing")

_seconds = dict.fromkeys(STAGES, 0.0)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """The block is this stage's work."""
    began = time.perf_counter()
    try:
        yield
    finally:
        _seconds[name] = _seconds.get(name, 0.0) + time.perf_counter() - began


def timed(name: str, items: Iterable[T]) -> Iterator[T]:
    """The items; what it takes to produce each is this stage's work."""
    # Not by `stage`: documents are many, and short ones take less time than a context manager.
    clock = time.perf_counter
    began = clock()
    for item in items:
        _seconds[name] += clock() - began
        yield item
        began = clock()
    _seconds[name] += clock() - began


def take() -> dict[str, float]:
    """Seconds of each stage since the last call."""
    taken = dict(_seconds)
    for name in _seconds:
        _seconds[name] = 0.0
    return taken
