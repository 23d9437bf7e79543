"""A rank that comes to its end while a collective of its own still waits for the other rank.

    torchrun --standalone --nproc-per-node 2 late_collective.py seconds

Its tensor is then dropped by a thread of gloo, some time during the rank's end. `ordinary` as a second
argument takes the interpreter down, as Python does by itself: it aborts at most delays from 0.3 to 0.6.
"""

import atexit
import contextlib
import sys
import threading
import time

import torch
import torch.distributed as distributed

from spikescale.training.ending import end_process


def main(seconds: float) -> None:
    distributed.init_process_group("gloo")
    atexit.register(print, f"exit function of rank {distributed.get_rank()}")
    threading.Thread(target=lambda: (time.sleep(0.05), print("a thread's last words"))).start()
    tensor = torch.nn.Parameter(torch.zeros(64)).data  # one that Python knows
    distributed.all_reduce(tensor)
    if distributed.get_rank() == 0:
        distributed.all_reduce(tensor, async_op=True)
        sys.modules["much_to_take_down"] = [[index] for index in range(3_000_000)]  # type: ignore[assignment]
    else:
        time.sleep(seconds)
        with contextlib.suppress(RuntimeError):  # the other rank may have gone
            distributed.all_reduce(tensor)


if __name__ == "__main__":
    main(float(sys.argv[1]))
    if sys.argv[2:] == ["ordinary"]:
        sys.exit(0)
    end_process(0)
