"""Steps that wait for data which are being made: how long, for whose, and what its producer is slow at."""

import torch

from spikescale.data_pipeline.live import LiveDataset
from spikescale.training.bootstrap import Process
from spikescale.training.dataset import Dataset, Part

WAIT_SHARE = 0.01  # of the time spent waiting for data, from which on it is told who is slow


class DataWaits:
    """Looks at the waits since it looked last; every rank has one."""

    def __init__(self, data: Dataset, process: Process) -> None:
        self._parts = [(part, part.manifest) for part in data.parts if isinstance(part.manifest, LiveDataset)]
        self._process, self._mixed = process, data.mixed
        self._marks = [0.0] * len(self._parts)

    def look(self, share: float) -> tuple[float, str]:
        """The share of the time that went to waiting, and on rank 0 who is slow if it is too much; else "".

        share: this rank's. Where data are being made every rank calls it and gets that of the one that waited
        longest: rank 0 may be the one that waits for the others.
        """
        if not self._parts:
            return share, ""
        totals = [live.waited for _, live in self._parts]
        seconds = [total - mark for total, mark in zip(totals, self._marks, strict=True)]
        self._marks = totals
        if self._process.world_size > 1:
            longest = torch.tensor([share, *seconds], dtype=torch.float64).to(self._process.device)
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
            share, *seconds = longest.tolist()
        # All are asked each time, so that the answers are of the same steps as the waits.
        slowest = [part.producer.slowest() if part.producer else "" for part, _ in self._parts]
        if not self._process.is_main or share <= WAIT_SHARE:
            return share, ""
        worst = seconds.index(max(seconds))
        told = f"{share:.1%} of the time went to waiting for data"
        if self._mixed and not seconds[worst]:
            return share, f"{told}, none of it for data that are being made"
        part, _ = self._parts[worst]
        whose = f", most for {part.name}" if self._mixed else ""
        return share, f"{told}{whose}: {_made(part)}; {slowest[worst]}"

    def waited_for(self) -> str:
        """The names of the sources that this rank is waiting for, in brackets; empty where there is one."""
        names = [part.name for part, live in self._parts if live.waiting]
        return f" ({', '.join(names)})" if self._mixed and names else ""


def _made(part: Part) -> str:
    assert part.producer is not None  # on rank 0
    return f"{part.producer.done} of {part.producer.partitions} shards are made"
