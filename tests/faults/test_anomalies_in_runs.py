"""Losses that are no numbers, spikes and silent layers, in runs of one process."""

import json

import pytest
from processes import events, records, run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

BAD = "faults.inject=nan@8-10"


def curve(folder):
    return {record["step"]: record["loss"] for record in records(folder) if "loss" in record}


def test_a_step_whose_loss_is_no_number_changes_nothing_and_is_counted(runs):
    folder, ends, _ = runs
    assert ends["one"] == ""
    whole, one = curve(folder / "whole"), curve(folder / "one")
    assert [step for step in one if one[step] is None] == [5]
    assert {step: one[step] for step in range(1, 5)} == pytest.approx(
        {step: whole[step] for step in range(1, 5)}, abs=1e-6
    )
    (skip,) = events(folder / "one", "skip")
    assert (skip["step"], skip["batch"], skip["reason"]) == (5, 5, "the loss is nan")
    (noted,) = [record for record in records(folder / "one") if "skipped" in record]
    assert (noted["step"], noted["skipped_steps"], noted["rollbacks"]) == (5, 1, 0)
    assert "step 5: the loss is nan; its update is dropped (1 in a row)" in log(folder / "one")


def log(folder):
    return (folder / "log.txt").read_text(encoding="utf-8")


def test_three_bad_steps_lead_back_to_the_checkpoint_and_past_the_data(runs):
    folder, ends, _ = runs
    assert ends["rolled"] == ""
    whole, rolled = curve(folder / "whole"), curve(folder / "rolled")
    assert list(rolled) == list(range(1, 13))
    # Step 8 is the last good checkpoint's only if it was written before the bad steps: they start at step 8.
    assert all(rolled[step] == whole[step] for step in range(1, 5))
    assert rolled[5] != whole[5]
    (back,) = events(folder / "rolled", "roll-back")
    assert (back["step"], back["from_step"], back["batches_passed"]) == (4, 10, [5, 10])
    (noted,) = [record for record in records(folder / "rolled") if "rollback" in record]
    assert (noted["step"], noted["rollback"], noted["skipped_steps"]) == (4, 1, 3)
    state = json.loads((folder / "rolled" / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["data"]["samples"] == (12 + 6) * 8
    assert state["faults"]["rollbacks"] == 1


def test_a_run_that_is_killed_after_its_roll_back_does_the_same_again(runs):
    folder, _, file = runs
    # Step 11 is reached only after the roll-back; the restart begins at step 8's checkpoint, made after it.
    run(["--max-restarts", "3", "--config", str(file), "name=killed", f"{BAD};kill@11"])
    (restart,) = events(folder / "killed", "restart")
    assert restart["from"] == "step-00000008"
    assert records(folder / "killed") == records(folder / "rolled")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("limited", "after 0 roll-backs (faults.rollback_limit = 0)"),
        ("early", "3 steps in a row had no update and there is no checkpoint to go back to"),
    ],
)
def test_what_does_not_help_ends_the_run_in_one_line(runs, name, words):
    _, ends, _ = runs
    assert "the loss is nan; lower train.lr" in ends[name]
    assert words in ends[name]


def test_a_spike_is_said_dropped_or_rolled_back_as_asked(runs):
    folder, ends, _ = runs
    assert [ends[name] for name in ("warned", "skipped", "returned")] == ["", "", ""]
    (spike,) = events(folder / "warned", "spike")
    assert spike["step"] == 11
    assert spike["z"] > 8
    (skip,) = events(folder / "skipped", "skip")
    assert (skip["step"], skip["batch"]) == (11, 11)
    (back,) = events(folder / "returned", "roll-back")
    assert (back["step"], back["from_step"], back["batches_passed"]) == (8, 11, [9, 11])
    whole, skipped = curve(folder / "whole"), curve(folder / "skipped")
    assert all(skipped[step] == whole[step] for step in range(1, 11))
    assert skipped[12] != curve(folder / "warned")[12]


def test_a_silent_layer_is_warned_of_once_and_when_it_recovers(runs):
    folder, ends, _ = runs
    assert ends["silenced"] == ""
    layer = "blocks.1.channel_neuron"
    changes = [
        (event["step"], kind, event["share"])
        for kind in ("silent", "recovered")
        for event in events(folder / "silenced", kind)
        if event["layer"] == layer and event["step"] > 8
    ]
    # Rates are taken over four logged steps: 9 to 12 are the first four of silence.
    assert [change[:2] for change in changes] == [(12, "silent"), (14, "recovered")]
    assert changes[0][2] == 1.0
    assert f"step 12: {layer}: 100% of its neurons never fire" in log(folder / "silenced")
    lines = [json.loads(line) for line in (folder / "silenced" / "metrics.jsonl").read_text().splitlines()]
    dead = {line["step"]: line["dead_neurons"][layer] for line in lines if "loss" in line}
    assert (dead[12], dead[13]) == (1.0, 1.0)
    assert dead[18] < 0.9

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("spikescale").experiment_id])
    history = client.get_metric_history(found.info.run_id, f"dead/{layer}")
    assert {metric.step: metric.value for metric in history} == dead
