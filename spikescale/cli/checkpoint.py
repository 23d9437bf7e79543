"""`spikescale checkpoint`: list a run's checkpoints, verify them, put one together into a single part."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.training.checkpoint_files import Checkpoint

DAMAGED = 1  # exit code of `verify` when a checkpoint is damaged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    made = _action(parser, actions, "list", "steps, losses, sizes and layouts of a run's checkpoints")
    made.add_argument("folder", type=Path, metavar="RUN", help="run folder, or its folder checkpoints")
    made = _action(parser, actions, "verify", "compare every file with its checksum; exit code 1 on damage")
    made.add_argument(
        "path", type=Path, metavar="RUN|CHECKPOINT", help="one checkpoint, or a run for all of its"
    )
    made = _action(parser, actions, "convert", "put a checkpoint of many ranks together into a single part")
    made.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a folder step-*, or a run: its latest"
    )
    made.add_argument(
        "output", type=Path, metavar="OUTPUT", help="checkpoint folder to make; must not exist yet"
    )


def run(arguments: argparse.Namespace) -> int:
    """Do the action."""
    return {"list": _list, "verify": _verify, "convert": _convert}[arguments.action](arguments)


def _action(
    parser: argparse.ArgumentParser, actions: "argparse._SubParsersAction", name: str, summary: str
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = actions.add_parser(
        name, help=summary, description=summary, formatter_class=parser.formatter_class
    )
    return made


def _list(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from spikescale.training.checkpoint_files import (
        best_checkpoint,
        checkpoint_names,
        read_checkpoint,
        total_bytes,
    )

    folder = _folder_of_checkpoints(arguments.folder)
    table = Table(title=str(folder), title_justify="left")
    for column in ("checkpoint", "step", "valid loss", "size", "layout", "marks"):
        table.add_column(column, justify="right" if column in ("step", "valid loss", "size") else "left")
    readable, unreadable = [], {}
    for name in checkpoint_names(folder):
        try:
            readable.append((read_checkpoint(folder / name), total_bytes(folder / name)))
        except (UserError, KeyError, TypeError, ValueError) as error:
            unreadable[name] = error
    best = best_checkpoint(checkpoint for checkpoint, _ in readable)
    latest = _pointed(folder / "latest")
    for checkpoint, size in readable:
        name, loss = checkpoint.folder.name, checkpoint.valid_loss
        marks = [mark for mark, there in (("latest", name == latest), ("best", checkpoint is best)) if there]
        table.add_row(
            name,
            str(checkpoint.step),
            "-" if loss is None else f"{loss:.4f}",
            _size(size),
            _layout(checkpoint),
            ", ".join(marks),
        )
    for name in unreadable:
        table.add_row(name, "-", "-", "-", "-", "not readable")
    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False, emoji=False).print(table)
    for name, reason in unreadable.items():
        print(f"{name}: {reason}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from spikescale.training.checkpoint import verify_checkpoint
    from spikescale.training.checkpoint_files import STATE, checkpoint_names

    path = arguments.path
    if (path / STATE).is_file() or path.name.startswith("step-"):
        folders = [path]
    else:
        folder = _folder_of_checkpoints(path)
        folders = [folder / name for name in checkpoint_names(folder)]
    if not all(folder.is_dir() for folder in folders):
        raise UserError(f"{path}: no such folder")
    damaged = 0
    for folder in folders:
        try:
            verify_checkpoint(folder)
            print(f"{folder}: whole")
        except UserError as error:
            damaged += 1
            print(f"{folder}: damaged: {error}")
    return DAMAGED if damaged else 0


def _convert(arguments: argparse.Namespace) -> int:
    from spikescale.training.checkpoint_files import STATE
    from spikescale.training.convert import consolidate

    source = arguments.checkpoint
    if not (source / STATE).is_file():
        folder = _folder_of_checkpoints(source)
        source = folder / (_pointed(folder / "latest") or "latest")
    made = consolidate(source, arguments.output)
    print(f"{source} -> {made.folder}: step {made.step}, one part")
    return 0


def _folder_of_checkpoints(path: Path) -> Path:
    for folder in (path / "checkpoints", path):
        if any(folder.glob("step-*")):
            return folder
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    raise UserError(f"{path}: no checkpoints here (looked for step-* and checkpoints/step-*)")


def _pointed(pointer: Path) -> str | None:
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def _layout(checkpoint: "Checkpoint") -> str:
    layout = checkpoint.layout
    if layout is None:
        return "one part"
    words = [f"{layout['ranks']} rank{'s' if layout['ranks'] > 1 else ''}", f"ZeRO {layout['zero_stage']}"]
    words += [f"{name} {layout[name]}" for name in ("tensor", "context") if layout[name] > 1]
    return ", ".join(words)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
