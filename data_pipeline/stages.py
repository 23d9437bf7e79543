"""Where the time of preparing goes: seconds a stage, added up in the process that does the work."""

import contextlib
import time
from collections.abc import Iterator

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


def take() -> dict[str, float]:
    """Seconds of each stage since the last call."""
    taken = dict(_seconds)
    for name in _seconds:
        _seconds[name] = 0.0
    return taken
