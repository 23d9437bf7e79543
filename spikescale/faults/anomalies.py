"""Judging each step's loss and gradient: is the update to be used, dropped, or is it time to go back?

Every rank judges the same figures, so that all come to the same end without asking one another. What the
judge remembers is a part of the checkpoint: a run that starts again judges as the one before would have.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from spikescale.config import FaultConfig

Action = Literal["use", "drop", "roll-back"]

LEAST_LOSSES = 8  # before that many are known, nothing is a spike
MAD_TO_DEVIATION = (
    1.4826  # of a normal distribution: its standard deviation over its median absolute deviation
)
LEAST_DEVIATION = 1e-3  # of the median: losses that hardly differ make no spike of a small change


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a step's update, and why; `reason` is empty for a step like any other."""

    action: Action = "use"
    reason: str = ""
    z: float | None = None


class Judge:
    """Watches the losses of one run.

    `dropped_steps` and `rollbacks` count over the life of the run, `bad_in_a_row` the steps without an update
    since the last one with.
    """

    def __init__(self, config: FaultConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.bad_in_a_row = self.dropped_steps = self.rollbacks = self.spikes = 0

    def score(self, loss: float) -> float | None:
        """How far `loss` lies above recent ones, in robust standard deviations; None: too few are known."""
        if len(self.losses) < min(LEAST_LOSSES, self.config.spike_window):
            return None
        middle = statistics.median(self.losses)
        spread = statistics.median(abs(known - middle) for known in self.losses)
        return (loss - middle) / max(MAD_TO_DEVIATION * spread, LEAST_DEVIATION * abs(middle), 1e-12)

    def look_at(self, loss: float, norm: float | None) -> Verdict:
        """What the step's loss (over all ranks) and, where known, gradient norm say before its update."""
        if not math.isfinite(loss):
            return Verdict("drop", f"the loss is {loss}")
        if norm is not None and not math.isfinite(norm):
            return Verdict("drop", f"the gradient norm is {norm}")
        z = self.score(loss) if self.config.spike_action != "off" else None
        if z is None or z < self.config.spike_z:
            return Verdict(z=z)
        reason = f"loss {loss:.4f} is a spike, {z:.1f} deviations above the last {len(self.losses)}"
        actions: dict[str, Action] = {"warn": "use", "skip": "drop", "roll-back": "roll-back"}
        return Verdict(actions[self.config.spike_action], reason, z)

    def take(self, loss: float, verdict: Verdict) -> Verdict:
        """Remember the step, its update used or dropped; a long row of dropped ones is a roll-back."""
        self.spikes += verdict.z is not None and bool(verdict.reason)
        if verdict.action == "use":
            self.losses.append(loss)
            self.bad_in_a_row = 0
            return verdict
        self.bad_in_a_row += 1
        self.dropped_steps += 1
        if verdict.action == "drop" and self.bad_in_a_row >= self.config.nonfinite_limit:
            return Verdict("roll-back", verdict.reason, verdict.z)
        return verdict

    def rolled_back(self, state: dict[str, Any]) -> None:
        """Go on from the judge's state in a checkpoint, one roll-back later."""
        rollbacks, dropped, spikes = self.rollbacks, self.dropped_steps, self.spikes
        self.load_state_dict(state)
        self.rollbacks, self.dropped_steps, self.spikes = rollbacks + 1, dropped, spikes

    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on, as JSON can hold it."""
        return {
            "losses": list(self.losses),
            "bad_in_a_row": self.bad_in_a_row,
            "dropped_steps": self.dropped_steps,
            "rollbacks": self.rollbacks,
            "spikes": self.spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; a checkpoint without it starts a new judge."""
        self.losses = deque(state.get("losses", []), maxlen=self.config.spike_window)
        for name in ("bad_in_a_row", "dropped_steps", "rollbacks", "spikes"):
            setattr(self, name, int(state.get(name, 0)))
