"""Meeting in torchrun's store, in which the ranks of earlier rounds have left their addresses.

Since torch 2.13 all rounds of one torchrun share a store, so that ranks that are started again find the
addresses of those that have ended. Here the ranks of a round first agree on a name that only they know: each
of them says hello under a word of its own, rank 0 answers every such word, stale ones too, and goes on when
all have used its answer.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.02


def round_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of `store` that belongs to the ranks which now call this, however often others did before.

    Raises dist.DistStoreError when they have not all called it in time.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    if rank:
        word = uuid.uuid4().hex
        store.set(f"spikescale/hello/{rank}", word)
        _wait(store, f"spikescale/answer/{word}", deadline)
        name = store.get(f"spikescale/answer/{word}").decode()
        store.set(f"{name}/here/{rank}", "yes")
    else:
        name = f"spikescale/round/{uuid.uuid4().hex}"
        missing = set(range(1, world_size))
        while missing:
            for other in sorted(missing):
                if store.check([f"{name}/here/{other}"]):
                    missing.discard(other)
                elif store.check([f"spikescale/hello/{other}"]):
                    word = store.get(f"spikescale/hello/{other}").decode()
                    store.set(f"spikescale/answer/{word}", name)
            _pause(deadline, f"{len(missing)} of {world_size} ranks have not come")
    return dist.PrefixStore(f"{name}/", store)


def _wait(store: dist.Store, key: str, deadline: float) -> None:
    while not store.check([key]):
        _pause(deadline, "rank 0 has not come")


def _pause(deadline: float, complaint: str) -> None:
    if time.monotonic() > deadline:
        raise dist.DistStoreError(complaint)
    time.sleep(POLL_SECONDS)
