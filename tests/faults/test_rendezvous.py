"""Ranks that meet in a store which earlier rounds have used."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from spikescale.training.rendezvous import round_store


def meet(store, world_size):
    """All ranks of a round call `round_store`, rank 0 last; what each finds there."""
    found = {}

    def join(rank):
        part = round_store(store, rank, world_size, timedelta(seconds=60))
        part.set(f"address/{rank}", f"round {id(found)} rank {rank}")
        found[rank] = [part.get(f"address/{other}").decode() for other in range(world_size)]

    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(world_size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_round_sees_its_own_ranks_and_nothing_of_the_rounds_before():
    store = dist.HashStore()
    store.set("spikescale/hello/2", "word of a rank that ended while it waited")
    for world_size in (3, 3, 2, 1):
        found = meet(store, world_size)
        expected = [f"round {id(found)} rank {rank}" for rank in range(world_size)]
        assert found == dict.fromkeys(range(world_size), expected)


def test_ranks_that_do_not_come_are_an_error():
    for rank, complaint in ((0, "2 of 3 ranks have not come"), (1, "rank 0 has not come")):
        with pytest.raises(dist.DistStoreError, match=complaint):
            round_store(dist.HashStore(), rank, 3, timedelta(seconds=0.1))
