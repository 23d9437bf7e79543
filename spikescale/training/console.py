"""What the person at the terminal sees: a progress bar on a terminal, plain lines in a file."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

LOG_COLUMNS = 120
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TrainingConsole:
    """One tidy line for each logged step, on the terminal and in a log file; silent on other ranks than 0."""

    def __init__(self, steps: int, first_step: int, log_file: Path | None) -> None:
        self.steps = steps
        self._file = log_file.open("a", encoding="utf-8") if log_file else None
        # Without a terminal rich would fold lines and tables at 80 columns.
        width = None if sys.stdout.isatty() else LOG_COLUMNS
        self.console = Console(
            soft_wrap=True, highlight=False, emoji=False, quiet=log_file is None, width=width
        )
        self._progress: Progress | None = None
        if log_file and sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self._task = self._progress.add_task("training", total=steps, completed=first_step, figures="")
            self._progress.start()

    def step(self, step: int) -> None:
        """Move the bar."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def log(self, record: dict[str, Any], eta_seconds: float) -> None:
        """Print the figures of a logged step."""
        rate = _compact(record["tokens_per_second"])
        if self._progress:
            figures = f"loss {record['loss']:.3f}  {rate} tok/s"
            self._progress.update(self._task, completed=record["step"], figures=figures)
        norm, firing = record["gradient_norm"], record["firing_rate"]
        self.say(
            f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  loss {record['loss']:.4f}"
            f"  lr {record['lr']:.2e}  norm {'-' if norm is None else format(norm, '.3f')}"
            f"  {rate} tok/s  {_compact(record['flops_per_second'])}FLOP/s"
            f" ({record['peak_share']:.0%} of peak)"
            f"  firing {'-' if firing is None else format(firing, '.3f')}  eta {format_seconds(eta_seconds)}"
        )

    def say(self, text: str = "") -> None:
        """Print text; control characters, which a model may write, are shown instead of obeyed."""
        text = CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
        self.console.print(text, markup=False)
        if self._file:
            print(text, file=self._file, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a small table."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        if self._file:
            Console(file=self._file, width=LOG_COLUMNS).print(table)
            self._file.flush()

    def end_progress(self) -> None:
        """Leave the progress bar where it is; what is printed from now on stands below it."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """End the progress bar and close the log file."""
        self.end_progress()
        if self._file:
            self._file.close()


def format_seconds(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _compact(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"
