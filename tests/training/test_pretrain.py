"""launch/pretrain.py as its users start it: real processes, real files."""

import json
import shutil

import pytest
from launching import ROOT, launch, losses
from safetensors.torch import load_file

GOLDEN = [5.5450, 3.2958, 3.2446, 2.6259]  # nats a token at steps 1, 5, 10 and 20

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

    result = json.loads((folder / "result.json").read_text())
    assert (result["step"], set(result["splits"])) == (30, {"train", "valid", "test"})
    assert f"{result['splits']['test']['bits_per_byte']:.4f}" in done.stdout

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
    assert {"config.yaml", "curves.png", "samples.txt", "model"} <= {
        f.path for f in client.list_artifacts(run.info.run_id)
    }
    (version,) = client.search_model_versions("name = 'run'")
    best = min(validations, key=lambda record: record["valid_loss"])
    assert (version.run_id, version.tags["valid_loss"]) == (run.info.run_id, f"{best['valid_loss']:.6g}")


@pytest.mark.parametrize(
    ("launcher", "ranks", "stage", "save_async"),
    [("python", 1, 1, "false"), ("python", 1, 0, "true"), ("deepspeed", 2, 3, "true")],
)
def test_resumed_run_continues_the_loss_bit_for_bit(run_file, tmp_path, launcher, ranks, stage, save_async):
    words = [
        "--config",
        str(run_file),
        "model.dropout=0.1",
        "train.micro_batch_size=2",
        f"zero.stage={stage}",
        f"train.save_async={save_async}",
    ]
    done = launch([*words, "name=whole"], launcher, ranks)
    assert done.stdout.count("training stood still for") == 2
    assert done.stdout.count("in the background") == (2 if save_async == "true" else 0)
    whole = tmp_path / "runs" / "whole"
    part = tmp_path / "runs" / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-00000012")
    done = launch([*words, "name=part", "resume=must"], launcher, ranks)
    assert "resumed at step 6" in done.stdout
    assert losses(part) == losses(whole)
    last = "checkpoints/step-00000012/model/model.safetensors"
    weights, resumed = load_file(whole / last), load_file(part / last)
    assert all((weights[name] == resumed[name]).all() for name in weights)


def test_damaged_checkpoint_is_passed_over_and_other_ranks_go_on_from_the_one_before(run_file, tmp_path):
    launch(["--config", str(run_file)])
    folder = tmp_path / "runs" / "run"
    curve = losses(folder)
    damaged = next((folder / "checkpoints" / "step-00000012" / "training").glob("part-*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    done = launch(
        ["--config", str(run_file), "zero.stage=2", "train.micro_batch_size=2"], "torchrun", ranks=2
    )
    assert "passed over" in done.stderr
    assert "resumed at step 6" in done.stdout
    assert done.stdout.count("random generators are seeded anew") == 1
    assert losses(folder) == pytest.approx(curve, abs=1e-4)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, prepared_data):
    """Records of 20 float32 steps in a single process."""
    return run_steps(tmp_path_factory.mktemp("single"), prepared_data, "python", 1, ["zero.stage=0"])


def run_steps(folder, data, launcher, ranks, settings):
    """Records of 20 steps of the recipe configs/run/tiny.yaml, on the small corpus."""
    words = ["--config", str(ROOT / "configs" / "run" / "tiny.yaml"), f"data.path={data}", f"output={folder}"]
    words += ["train.steps=20", "train.log_every=1", "train.evaluate_every=10", "train.evaluate_tokens=2000"]
    words += ["train.save_every=0", "train.sample_count=0", "train.final_evaluation_tokens=1000"]
    words += ["train.threads=1", "mlflow.enabled=false"]
    launch([*words, *settings], launcher, ranks)
    lines = (folder / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def largest_difference(key, records, others, relative=False):
    pairs = [(a[key], b[key]) for a, b in zip(records, others, strict=True) if key in a]
    assert len(pairs) >= 2
    return max(abs(a - b) / (abs(b) if relative else 1) for a, b in pairs)


def test_losses_are_the_ones_known_to_be_right(one_process):
    # A change of the numerics shows here first. Other processors round otherwise, hence the tolerance.
    curve = {record["step"]: record["loss"] for record in one_process if "loss" in record}
    assert [curve[step] for step in (1, 5, 10, 20)] == pytest.approx(GOLDEN, abs=0.01)


@pytest.mark.parametrize(
    ("launcher", "stage"), [("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("torchrun", 0)]
)
def test_two_ranks_follow_the_single_process(one_process, tmp_path, prepared_data, launcher, stage):
    settings = [f"zero.stage={stage}", "train.micro_batch_size=4"]
    records = run_steps(tmp_path, prepared_data, launcher, 2, settings)
    assert [record["step"] for record in records] == [record["step"] for record in one_process]
    assert largest_difference("loss", records, one_process) < 1e-4
    assert largest_difference("valid_loss", records, one_process) < 1e-4
    assert largest_difference("gradient_norm", records, one_process, relative=True) < 1e-3


def test_checkpointed_and_compiled_modules_follow_the_plain_ones(one_process, tmp_path, prepared_data):
    settings = ["zero.stage=1", "train.activation_checkpointing=true", "train.compile=true"]
    records = run_steps(tmp_path, prepared_data, "python", 1, settings)
    assert largest_difference("loss", records, one_process) < 1e-3


def test_bfloat16_follows_float32(one_process, tmp_path, prepared_data):
    records = run_steps(tmp_path, prepared_data, "python", 1, ["train.precision=bfloat16"])
    assert 0 < largest_difference("loss", records, one_process) < 0.05


def test_a_corpus_without_validation_or_test_split_trains(tmp_path, prepared_data):
    from spikescale.cli.main import main

    words = [
        "data",
        "prepare",
        "--source",
        str(prepared_data.parent / "text"),
        "--output",
        str(tmp_path / "data"),
    ]
    assert main([*words, "--no-ray", "--valid-fraction", "0", "--test-fraction", "0"]) == 0
    records = run_steps(tmp_path, tmp_path / "data", "python", 1, [])
    assert len(records) == 20
    log = (tmp_path / "tiny" / "log.txt").read_text()
    assert "no validation split" in log
    assert "evaluating 1000 of" in log
