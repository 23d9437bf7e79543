"""What all ranks must do or fail to do together.

An error that one rank alone finds would leave the others waiting for it, or be lost when the launcher
ends them. So the ranks tell each other, all stop, and one of them speaks.
"""

import contextlib
import fcntl
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from spikescale.errors import UserError
from spikescale.faults.exits import lost_reason
from spikescale.training.bootstrap import Process

T = TypeVar("T")


class AgreedError(UserError):
    """A UserError that every rank raises at the same point: rank 0 says it for all."""


def agreed(process: Process, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return this rank's result.

    Raises AgreedError on all ranks when it raised UserError on any: the first rank's, which is named
    when it is not rank 0. `action` must not wait for other ranks after it may have failed.
    """
    complaint, result = None, None
    try:
        result = action()
    except UserError as error:
        complaint = str(error)
    complaints = [complaint]
    if process.world_size > 1:
        complaints = [None] * process.world_size
        torch.distributed.all_gather_object(complaints, complaint and f"{complaint}\n{socket.gethostname()}")
    for rank, text in enumerate(complaints):
        if text is not None:
            message, _, host = text.partition("\n")
            raise AgreedError(message if rank == 0 else f"rank {rank} on {host}: {message}")
    return result  # type: ignore[return-value]  # no complaint: the action returned


def from_main(process: Process, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone and return its result on every rank; its UserError is everyone's."""
    result = agreed(process, lambda: action() if process.is_main else None)
    if process.world_size > 1:
        held = [result]
        torch.distributed.broadcast_object_list(held, src=0)
        result = held[0]
    return result  # type: ignore[return-value]  # the main rank's result has arrived


def say_error(process: Process, error: UserError) -> None:
    """Write the error's one line: once for all ranks if they agreed on it, else with the rank's number."""
    if isinstance(error, AgreedError):
        say_agreed(process, f"error: {error}")
    else:
        _write_line(f"error: rank {process.rank}: {error}" if process.world_size > 1 else f"error: {error}")


def say_agreed(process: Process, text: str) -> None:
    """Write one line for all ranks; every rank calls it, and none leaves before it is written."""
    if process.is_main:
        _write_line(text)
    if process.world_size > 1:
        # A launcher ends all ranks as soon as one has left.
        torch.distributed.barrier()


def say_lost(process: Process, error: BaseException) -> None:
    """Write the line of a rank that lost another one."""
    then = "the run goes on from its last checkpoint"
    _write_line(f"rank {process.rank}: another rank is gone ({lost_reason(error)}); {then}")


@contextlib.contextmanager
def only_run_in(folder: Path, process: Process) -> Iterator[None]:
    """Hold the run's folder on rank 0. Raises UserError while another process trains there."""
    if not process.is_main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            # Released by the system when this process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training there; choose another name") from None
        yield


def _write_line(text: str) -> None:
    # One write: lines of several ranks must not run into one another.
    sys.stderr.write(" ".join(text.split("\n")) + "\n")
    sys.stderr.flush()
