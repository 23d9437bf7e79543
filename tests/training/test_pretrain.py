"""launch/pretrain.py as its users start it: real processes, real files."""

import json
import shutil

import pytest
from launching import TINY, launch, losses
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_run_learns_and_leaves_everything_it_promises(run_file, tmp_path):
    done = launch(
        ["--config", str(run_file), "mlflow.enabled=true", "train.steps=30", "train.trigram_baseline=true"]
    )
    folder = tmp_path / "runs" / "run"
    curve = losses(folder)
    assert list(curve) == list(range(1, 31))
    assert curve[1] == pytest.approx(5.545, abs=0.2)  # ln 256: nothing is known at first
    assert curve[30] < 4.0
    assert (folder / "curves.png").stat().st_size > 10_000
    assert "=== step 30, sample 1" in (folder / "samples.txt").read_text()
    for words in ("trigram bits/byte", "test", "mlflow ui --host 127.0.0.1", "--- sample 1"):
        assert words in done.stdout
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"tokens_per_second", "flops_per_second", "peak_share", "gradient_norm"} <= set(records[0])
    assert len(records[0]["firing_rates"]) == 5  # the embedding, and two neurons a block
    validations = [r for r in records if "valid_loss" in r]
    assert [r["step"] for r in validations] == [6, 12, 18, 24, 30]

    checkpoints = folder / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == "step-00000030"
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-00000024", "step-00000030"]
    assert load_file(checkpoints / "step-00000030" / "model" / "model.safetensors")

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("spikescale").experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert {m.step: m.value for m in history} == curve
    assert run.data.params["train.steps"] == "30"
    assert {"data.manifest_sha256", "environment.commit", "environment.torch"} <= set(run.data.tags)
    assert {"config.yaml", "curves.png", "samples.txt"} <= {
        f.path for f in client.list_artifacts(run.info.run_id)
    }


def test_resumed_run_continues_the_loss_bit_for_bit(run_file, tmp_path):
    words = ["--config", str(run_file), "model.dropout=0.1", "train.micro_batch_size=4"]
    launch([*words, "name=whole"])
    whole = tmp_path / "runs" / "whole"
    part = tmp_path / "runs" / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-00000012")
    done = launch([*words, "name=part", "resume=must"])
    assert "resumed at step 6" in done.stdout
    assert losses(part) == losses(whole)
    last = "checkpoints/step-00000012/model/model.safetensors"
    weights, resumed = load_file(whole / last), load_file(part / last)
    assert all((weights[name] == resumed[name]).all() for name in weights)


def test_damaged_checkpoint_is_passed_over_for_the_one_before(run_file, tmp_path):
    launch(["--config", str(run_file)])
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    damaged = next((checkpoints / "step-00000012" / "engine").glob("*optim*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    done = launch(["--config", str(run_file)])
    assert "passed over" in done.stderr
    assert "resumed at step 6" in done.stdout


@pytest.fixture(scope="module")
def one_process_curve(tmp_path_factory, prepared_data):
    """Losses of 20 float32 steps in a single process."""
    return run_steps(tmp_path_factory.mktemp("single"), prepared_data, "python", 1, stage=0)


def run_steps(folder, data, launcher, ranks, stage):
    content = {"output": str(folder / "runs"), "data": {"path": str(data)}, **TINY}
    (folder / "run.yaml").write_text(json.dumps(content))
    words = [
        "--config",
        str(folder / "run.yaml"),
        f"zero.stage={stage}",
        "train.steps=20",
        "train.save_every=0",
    ]
    launch(words, launcher, ranks)
    return losses(folder / "runs" / "run")


@pytest.mark.parametrize(
    ("launcher", "stage"), [("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("torchrun", 0)]
)
def test_two_ranks_follow_the_single_process_curve(
    one_process_curve, tmp_path, prepared_data, launcher, stage
):
    curve = run_steps(tmp_path, prepared_data, launcher, 2, stage)
    assert list(curve) == list(one_process_curve)
    assert max(abs(curve[step] - one_process_curve[step]) for step in curve) < 1e-4


def test_bfloat16_follows_float32(one_process_curve, tmp_path, run_file):
    launch(["--config", str(run_file), "train.precision=bfloat16", "train.steps=20", "train.save_every=0"])
    curve = losses(tmp_path / "runs" / "run")
    assert max(abs(curve[step] - one_process_curve[step]) for step in curve) < 0.05
    assert curve != one_process_curve
