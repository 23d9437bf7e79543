"""What a run does when a step goes wrong, when it is asked to stop, and when it cannot read on.

All ranks come here together, by what they agreed on or judged alike.
"""

from typing import TYPE_CHECKING

from spikescale.errors import UserError
from spikescale.faults.events import append_event
from spikescale.faults.exits import RequeueError
from spikescale.training.agreement import AgreedError, agreed

if TYPE_CHECKING:
    from spikescale.training.run import Outcome, Pretraining

HINT = "lower train.lr or raise train.warmup_steps"


def note(run: "Pretraining", outcome: "Outcome") -> None:
    """Say and record why the step that just ended was not like any other."""
    verdict, judge = outcome.verdict, run.judge
    used = verdict.action == "use"
    what = "used" if used else f"its update is dropped ({judge.bad_in_a_row} in a row)"
    run.console.say(f"step {run.step}: {verdict.reason}; {what}")
    counts = {"skipped_steps": judge.dropped_steps, "rollbacks": judge.rollbacks, "spikes": judge.spikes}
    run.records.write({"step": run.step, ("spike" if used else "skipped"): verdict.reason, **counts})
    facts = {"loss": outcome.agreement.loss, "batch": run.feed.number, "z": verdict.z}
    run.records.event("spike" if used else "skip", run.step, reason=verdict.reason, **facts)


def roll_back(run: "Pretraining", reason: str) -> None:
    """Back to the newest checkpoint, and on with the data after those that were read.

    The steps count from the checkpoint again, the data do not: what was read since, the bad batches among it,
    is passed over, and the position goes into the next checkpoint. Raises AgreedError without a
    checkpoint, or when it has been tried `faults.rollback_limit` times.
    """
    failed, judge, limit = run.step, run.judge, run.config.faults.rollback_limit
    row = f"{judge.bad_in_a_row} steps in a row had no update" if judge.bad_in_a_row else "nothing was saved"
    told = f"step {failed}: {reason}; {HINT}: {row}"
    if judge.rollbacks >= limit:
        raise AgreedError(f"{told} after {judge.rollbacks} roll-backs (faults.rollback_limit = {limit})")
    with run.guard.patience("rolling back"):
        checkpoint = run.checkpoints.newest_valid()
        if checkpoint is None:
            raise AgreedError(f"{told} and there is no checkpoint to go back to")
        run.checkpoints.load(checkpoint, run.engine, run.config)
    judge.rolled_back(checkpoint.state.get("faults", {}))
    run.health.load_state_dict(checkpoint.state.get("neurons", {}))
    run.step = run.saved_step = checkpoint.step
    size = run.loader.batch_size
    passed = [checkpoint.state["data"]["samples"] // size + 1, run.feed.state_dict()["samples"] // size]
    facts = {"from_step": failed, "batches_passed": passed, "reason": reason}
    counts = {"skipped_steps": judge.dropped_steps, "rollbacks": judge.rollbacks, "spikes": judge.spikes}
    run.records.roll_back(run.step, judge.rollbacks, {**facts, **counts})
    run.records.event("roll-back", run.step, number=judge.rollbacks, **facts)
    run.console.say(
        f"step {failed}: {reason}; rolled back to step {run.step} ({judge.rollbacks} of at most {limit}),"
        f" on with batch {passed[1] + 1}"
    )
    run.console.step(run.step)


def stop(run: "Pretraining", reason: str) -> None:
    """Save and end. Raises RequeueError."""
    save_now(run)
    run.records.event("stop", run.step, reason=reason, saved=run.saved_step)
    kept = f"saved step {run.saved_step}" if run.saved_step else "nothing could be saved yet"
    raise RequeueError(
        f"step {run.step}: stopped by {reason}; {kept} in {run.checkpoints.folder}: start the same command"
        " again to go on"
    )


def end_without_data(run: "Pretraining") -> None:
    """Save and end because a rank cannot read the next batch. Raises AgreedError, unless it is not needed."""
    if run.step < run.config.train.steps:
        save_now(run)
        run.records.event("no-data", run.step, saved=run.saved_step)
        require_data(run)


def require_data(run: "Pretraining") -> None:
    """Raise AgreedError on every rank when any cannot read the next batch."""

    if reason := run.read_ahead():
        stop(run, reason)

    def check() -> None:
        try:
            run.feed.check()
        except UserError as error:
            raise UserError(f"{error}; the run goes on from step {run.saved_step} when it is back") from None

    agreed(run.process, check)


def save_now(run: "Pretraining") -> None:
    """Have this step's state on the disk, unless its update was dropped: then the last save has to do."""
    if run.saved_step != run.step and not run.judge.bad_in_a_row:
        run.save()
    run.checkpoints.finish()


def note_hang(run: "Pretraining", phase: str, seconds: float) -> None:
    """Record, from any rank, that the watchdog is about to end it."""
    facts = {"rank": run.process.rank, "phase": phase, "seconds": round(seconds, 1)}
    append_event(run.config.folder, "hang", run.step, **facts)
