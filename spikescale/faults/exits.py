"""Exit codes, and the ends of a run that are no errors of its user."""

import re
import signal

from spikescale.errors import UserError

DONE = 0
BAD_INPUT = UserError.exit_code
REQUEUE = 75  # EX_TEMPFAIL: stopped and saved; the same command goes on
HUNG = 76  # the watchdog saw no step for too long
LOST = 77  # the connection to another rank broke
INTERRUPTED = 130

FINAL = (DONE, BAD_INPUT, REQUEUE, INTERRUPTED)  # starting again would not help, or was not asked for

# What torch says when the process at the other end of a connection has gone. gloo's errors carry the path of
# its source, those of NCCL are of a type of their own.
_GLOO = ("gloo/transport", "gloo::", "connection closed by peer", "connection reset by peer")
_NCCL = ("remote process exited", "nccl communicator was aborted", "socket timeout", "broken pipe")


class RequeueError(Exception):
    """Every rank has stopped after the same step and a checkpoint is on the disk; the message says why."""

    exit_code = REQUEUE


def is_lost_rank(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone, rather than that something is wrong here."""
    words = str(error).lower()
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return isinstance(error, RuntimeError) and any(word in words for word in (*_GLOO, *_NCCL))


def lost_reason(error: BaseException) -> str:
    """The first sentence of such an error, without the place in gloo's source."""
    text = re.sub(r"\[/[^\]]*\] *", "", " ".join(str(error).split()))
    return text.partition(". ")[0][:160] or type(error).__name__


def signal_name(code: int) -> str | None:
    """The name of the signal that a process ended by, from its code as subprocess reports it; else None."""
    try:
        return signal.Signals(-code).name if code < 0 else None
    except ValueError:
        return f"signal {-code}"


def shell_code(code: int) -> int:
    """A code as shells show it: 128 + n for a process that signal n ended."""
    return 128 - code if code < 0 else code
