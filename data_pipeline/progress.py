"""Progress of preparation and transfer: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

LINE_SECONDS = 10.0


class Progress:
    """Shows documents, tokens a second and the time left. A context manager and a pool's Listener.

    The time left is judged by the partitions' stored bytes, where they are known.

    Args:
        title: what is being done.
        sizes: stored bytes of each partition, in task order.
        output: where to; None is standard error.
        quiet: show nothing.
    """

    def __init__(
        self, title: str, sizes: Sequence[int], output: TextIO | None = None, quiet: bool = False
    ) -> None:
        self.documents = self.tokens = self.text_bytes = self.done = 0
        self._title = title
        self._sizes = [max(1, size) for size in sizes]
        self._finished_size = 0
        self._output = sys.stderr if output is None else output
        self._quiet = quiet
        self._began = time.monotonic()
        self._last_line = self._began
        self._bar: Any = None
        self._row: Any = None

    def __enter__(self) -> "Progress":
        if not self._quiet and self._output.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = RichProgress(*columns, console=Console(file=self._output))
            self._bar.start()
            self._row = self._bar.add_task(self._title, total=1.0, state="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._show()
            self._bar.stop()
        elif not self._quiet and kind is None:
            print(f"{self._title}: {self.state()}", file=self._output, flush=True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    @property
    def fraction(self) -> float:
        """The share that is done, by stored bytes; text read from unfinished partitions counts as such."""
        finished = self._finished_size / sum(self._sizes)
        if self.done == len(self._sizes):
            return 1.0
        return min(0.999, max(finished, self.text_bytes / sum(self._sizes)))

    def advance(self, documents: int, tokens: int, text_bytes: int) -> None:
        """See pools.Listener."""
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes
        self._show()

    def task_done(self, index: int) -> None:
        """See pools.Listener."""
        self.done += 1
        self._finished_size += self._sizes[index]
        self._show()

    def state(self) -> str:
        """One line: partitions, documents, tokens, speed, time left."""
        elapsed = max(self.seconds, 1e-9)
        parts = [f"{self.done}/{len(self._sizes)} partitions", f"{self.documents:,} documents"]
        if self.tokens:
            parts += [f"{self.tokens:,} tokens", f"{self.tokens / elapsed:,.0f} tokens/s"]
        fraction = self.fraction
        if fraction >= 1.0:
            parts.append(f"{elapsed:.1f} s")
        elif fraction > 0:
            parts.append(f"{_clock(elapsed * (1 - fraction) / fraction)} left")
        return ", ".join(parts)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._row, completed=self.fraction, state=self.state())
        elif not self._quiet and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(f"{self._title}: {self.state()}", file=self._output, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TransferBar:
    """Bytes that went through, of all threads: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, title: str, sizes: Mapping[str, int], quiet: bool) -> None:
        self._title = title
        self._sizes = sizes
        self._total = sum(sizes.values())
        self._quiet = quiet
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}
        self._done = 0
        self._last_line = time.monotonic()
        self._rich: Any = None
        self._row: Any = None

    def __enter__(self) -> "TransferBar":
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._rich = Progress(*columns, console=Console(file=sys.stderr))
            self._rich.start()
            self._row = self._rich.add_task(self._title, total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif kind is None:
            self._say()

    def restart(self, name: str) -> None:
        """The file is read from its start."""
        self._set(name, 0)

    def advance(self, name: str, amount: int) -> None:
        """So many more bytes of the file went through."""
        self._set(name, self._bytes.get(name, 0) + amount)

    def done(self, name: str) -> None:
        """The file is there, and right."""
        with self._lock:
            self._done += 1
        self._set(name, self._sizes[name])

    def _set(self, name: str, amount: int) -> None:
        with self._lock:
            self._bytes[name] = amount
            if self._rich is not None:
                self._rich.update(self._row, completed=sum(self._bytes.values()))
            elif time.monotonic() - self._last_line >= LINE_SECONDS:
                self._last_line = time.monotonic()
                self._say()

    def _say(self) -> None:
        if not self._quiet:
            files = f"{self._done}/{len(self._sizes)} files"
            state = f"{files}, {sum(self._bytes.values()):,} of {self._total:,} bytes"
            print(f"{self._title}: {state}", file=sys.stderr, flush=True)
