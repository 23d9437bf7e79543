"""The end of a process that trained: everything an orderly end does, but for taking the interpreter down."""

import atexit
import os
import sys
import threading
from typing import NoReturn

LOST_OUTPUT = 120  # Python's own exit code where the last output could not be written


def end_process(code: int) -> NoReturn:
    """Join threads, run exit functions, flush the streams, and leave with this exit code.

    A thread of gloo may still hold the last reference to a tensor of a collective that every rank has waited
    for. Dropped while the interpreter is taken down, it asks for the GIL and is ended inside a C++ function
    that allows no unwinding: SIGABRT after a run that had finished (pytorch/pytorch#179291). Without the
    taking down there is nothing to race with.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does: hooks, then threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:
            code = code or LOST_OUTPUT
    os._exit(code)
