"""The words of `faults.inject`: which faults come on purpose, when and where.

    nan@12           the loss of batch 12 (counted from 1 along the data) is no number
    spike@20-22      the losses of batches 20 to 22 are 25 times what they are
    silence@5-9:blocks.0   neurons under that name do not fire in steps 5 to 9; without an end, from step 5 on
    kill@9:rank1     rank 1 ends by SIGKILL in the middle of step 9
    kill-save@12     rank 0 (no other is named) ends by SIGKILL in the middle of saving after step 12
    hang@7:rank1     rank 1 sleeps for ever in step 7
    pause@7          rank 0 sleeps in step 7 until the file `continue` is in the run's folder, and removes it
    sigterm@7:rank1, sigusr1@7:rank1   rank 1 gets the signal in step 7

Several are separated by `;`. Faults of data (nan, spike) come with their batch, and silence with its steps,
whenever they are there. The others come once in the life of a run's folder, in which `injected/` notes
them: a run that starts again passes the step unharmed.
"""

import re
from dataclasses import dataclass

DATA = ("nan", "spike")
ONCE = ("kill", "hang", "pause", "sigterm", "sigusr1")
SAVES = ("kill-save",)
KINDS = (*DATA, "silence", *ONCE, *SAVES)
FOR_EVER = 10**9
_FAULT = re.compile(r"(?P<kind>[a-z-]+\d?)@(?P<first>\d+)(-(?P<last>\d+))?(:(?P<where>[\w.]+))?")


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, the steps (or batches) it comes in, and where."""

    kind: str
    first: int
    last: int
    rank: int
    module: str

    @property
    def name(self) -> str:
        """As a file of `injected/` is called."""
        return f"{self.kind}@{self.first}-rank{self.rank}"

    def is_at(self, number: int) -> bool:
        """Whether it comes in step (or batch) `number`."""
        return self.first <= number <= self.last


def parse_faults(text: str) -> list[Fault]:
    """The faults that `faults.inject` names. Raises ValueError with what is wrong."""
    faults = []
    for word in filter(None, (part.strip() for part in text.split(";"))):
        match = _FAULT.fullmatch(word)
        if match is None or match["kind"] not in KINDS:
            raise ValueError(f"{word!r} is no fault; write kind@step, kind one of {', '.join(KINDS)}")
        kind, where = match["kind"], match["where"] or ""
        silence = kind == "silence"
        rank = re.fullmatch(r"rank(\d+)", where)
        if where and not silence and not rank:
            raise ValueError(f"{word!r}: {where!r} must be a rank, such as rank1")
        if silence and not where:
            raise ValueError(f"{word!r} needs the name of a layer, such as silence@5:blocks.0")
        first = int(match["first"])
        last = int(match["last"] or (FOR_EVER if silence else first))
        faults.append(Fault(kind, first, last, int(rank[1]) if rank else 0, where if silence else ""))
    return faults
