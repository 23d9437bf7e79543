"""A model divided over ranks by channels: everything is as in one process, and DeepSpeed knows of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from spikescale.config import ModelConfig, RunConfig
from spikescale.errors import UserError
from spikescale.parallel import Layout
from spikescale.parallel.mpu import require_groups
from spikescale.parallel.shards import full_shape, full_tensor, join, local_slice, mark_sharded
from spikescale.parallel.tensor import TensorParts, tensor_parts
from spikescale.training.engine import deepspeed_settings, micro_batching, uses_fused_loss

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "training"))

from launching import TINY, launch, write_corpus  # noqa: E402

STEPS = 20
VARIANTS = ("rwkv", "heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven")
# 257 ids: the byte tokenizer has 256, and no number of ranks divides them.
COMMON = "model.vocab_size=257 train.micro_batch_size=2"
TWO_RANKS = {
    "two-stage1": "zero.stage=1",
    "two-stage0": "zero.stage=0 train.activation_checkpointing=true",
    "two-driven": "zero.stage=2 model.variant=spikegpt-driven train.precision=bfloat16",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a small data set and a run file for it."""
    from spikescale.cli.main import main

    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "text")
    words = ["data", "prepare", "--source", str(folder / "text"), "--output", str(folder / "data")]
    assert main([*words, "--no-ray", "--tokenizer", "byte"]) == 0
    changes = {"steps": STEPS, "evaluate_every": 10, "save_every": 0, "final_evaluation_tokens": 500}
    content = {
        **TINY,
        "output": str(folder),
        "data": {"path": str(folder / "data")},
        "train": TINY["train"] | changes,
    }
    (folder / "run.yaml").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def results(prepared) -> dict:
    """What tensor_cases.py found, after which it trained the runs of TWO_RANKS."""
    output = prepared / "results.json"
    runs = [f"name={name} parallel.tensor=2 {COMMON} {words}" for name, words in TWO_RANKS.items()]
    binary = str(Path(sys.executable).parent / "torchrun")
    command = [binary, "--standalone", "--nproc-per-node=2", str(HERE / "tensor_cases.py")]
    process = subprocess.Popen(
        [*command, str(output), str(prepared / "run.yaml"), *runs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    try:
        words, _ = process.communicate(timeout=250)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # which torchrun passes on
        words, _ = process.communicate(timeout=30)
        pytest.fail(f"tensor_cases.py hung: {words[-3000:]}")
    assert process.returncode == 0, words[-6000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def single(prepared) -> Path:
    """The folder of the same run in one process."""
    launch(["--config", str(prepared / "run.yaml"), "name=single", "zero.stage=0", *COMMON.split()])
    return prepared / "single"


@pytest.fixture(scope="module")
def four_ranks(prepared) -> Path:
    """The folder of the run on two ranks for the model times two for the batch."""
    words = ["name=four", "zero.stage=2", "parallel.tensor=2", *COMMON.split()]
    launch(["--config", str(prepared / "run.yaml"), *words], "torchrun", ranks=4)
    return prepared / "four"


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def require_same_curves(found: list[dict], expected: list[dict]) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    steps = [(mine, one) for mine, one in zip(found, expected, strict=True) if "loss" in one]
    assert len(steps) == STEPS
    for mine, one in steps:
        assert mine["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert mine["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
    validations = [(mine, one) for mine, one in zip(found, expected, strict=True) if "valid_loss" in one]
    assert len(validations) == 2
    for mine, one in validations:
        assert mine["valid_tokens"] == one["valid_tokens"]
        assert mine["valid_loss"] == pytest.approx(one["valid_loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_loss_logits_gradients_and_their_norm_are_those_of_one_process(results):
    assert len(results["cases"]) == 21
    for case in results["cases"]:
        found = case["errors"]
        assert found["loss"] < 1e-6, case
        assert found["logits"] < (1e-12 if case["dtype"] == "float64" else 1e-5), case
        # Whatever the weights are, the loss is computed in float32.
        assert found["gradient"] < (1e-6 if case["dtype"] == "float64" else 5e-5), case
        assert found["norm"] < 1e-5, case


@pytest.mark.slow
@pytest.mark.distributed
def test_every_spike_is_that_of_one_process(results):
    for case in results["cases"]:
        assert case["errors"]["spikes"] == 0, case


@pytest.mark.slow
@pytest.mark.distributed
def test_initial_weights_are_bit_for_bit_those_of_one_process_and_padding_is_zero(results):
    expected = {"different": 0, "padding": 0, "sharded": 2 + 2 * 9, "miscounted": 0}
    assert results["initial"] == dict.fromkeys(VARIANTS, expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_autocast_loses_no_more_than_in_one_process(results):
    for variant, errors in results["bfloat16"].items():
        assert 0 < errors["divided_loss"] < 2 * errors["whole_loss"] + 0.01, variant
        assert 0 < errors["divided_gradient"] < 1.5 * errors["whole_gradient"] + 0.02, variant


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_generate_together_write_what_one_process_writes(results):
    assert results["generated"] == dict.fromkeys(VARIANTS, 0)


@pytest.mark.slow
@pytest.mark.distributed
def test_an_engine_without_the_groups_is_refused(results):
    assert "parallel.tensor = 2: DeepSpeed averages gradients over 2 rank(s)" in results["refusal"]
    assert "\n" not in results["refusal"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["two-stage1", "two-stage0"])
def test_pretraining_on_two_ranks_follows_the_single_process(results, prepared, single, name):
    found, expected = records(prepared / name), records(single)
    require_same_curves(found, expected)
    # Both read the same last micro-batch, of which firing rates are taken.
    for mine, one in zip(found, expected, strict=True):
        if "firing_rates" in one:
            assert mine["firing_rates"] == pytest.approx(one["firing_rates"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_driven_variant_learns_in_bfloat16(results, prepared):
    losses = [record["loss"] for record in records(prepared / "two-driven") if "loss" in record]
    assert losses[0] == pytest.approx(5.549, abs=0.2)  # ln 257: nothing is known at first
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
@pytest.mark.distributed
def test_a_divided_model_on_a_divided_batch_follows_the_single_process(four_ranks, single):
    require_same_curves(records(four_ranks), records(single))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_divided_model_is_saved_whole(four_ranks, single):
    saved = [folder / "checkpoints" / f"step-{STEPS:08d}" / "model" for folder in (four_ranks, single)]
    found, expected = (load_file(folder / "model.safetensors") for folder in saved)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert (found[name] - value).norm() < 1e-2 * value.norm() + 1e-4, name
    assert "=== step 20, sample 1" in (four_ranks / "samples.txt").read_text()


def sharded(dim: int, full_length: int, *shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape))
    mark_sharded(parameter, dim, full_length)
    return parameter


@pytest.mark.parametrize(
    ("dim", "full", "local", "size"),
    [(0, (5, 3), (2, 3), 3), (1, (4, 6), (4, 2), 3), (0, (8,), (4,), 2), (0, (5, 2), (2, 2), 4)],
)
def test_slices_joined_are_the_whole_and_padding_is_zero(dim, full, local, size):
    parameter, whole = sharded(dim, full[dim], *local), torch.randn(full)
    assert full_shape(parameter) == full
    parts = [local_slice(whole, parameter, rank, size) for rank in range(size)]
    assert all(part.shape == local and part.is_contiguous() for part in parts)
    assert torch.equal(join(parts, parameter), whole)
    padding = torch.cat(parts, dim).narrow(dim, full[dim], local[dim] * size - full[dim])
    assert torch.equal(padding, torch.zeros_like(padding))


def test_a_parameter_that_is_not_divided_is_its_own_slice():
    parameter = nn.Parameter(torch.randn(3))
    assert local_slice(parameter, parameter, 1, 2) is parameter
    assert full_tensor(parameter, parameter, None) is parameter


def test_a_slice_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"full must be \(5, 3\), not \(6, 3\)"):
        local_slice(torch.zeros(6, 3), sharded(0, 5, 3, 3), 0, 2)
    with pytest.raises(ValueError, match="2 parts of 2 do not make 5"):
        local_slice(torch.zeros(5, 3), sharded(0, 5, 2, 3), 0, 2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"zero": {"stage": 3}}, "parallel.tensor does not work with zero.stage 3: use a stage up to 2"),
        ({"model": {"width": 33}}, "parallel.tensor = 2 does not divide model.width = 33"),
        (
            {"train": {"compile": True}},
            "train.compile does not work with parallel.tensor or parallel.context",
        ),
        ({"parallel": {"tensor": 2, "context": 2}}, "tensor and context do not go together"),
    ],
)
def test_what_tensor_parallelism_cannot_do_is_refused(changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        run_config(**changes)


def run_config(**changes: object) -> RunConfig:
    return RunConfig.model_validate({"data": {"path": Path("data")}, "parallel": {"tensor": 2}, **changes})


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"parallel\.tensor = 2 does not divide model\.width = 33"):
        tensor_parts(Layout(0, 2, tensor=2), ModelConfig(width=33, vocab_size=5))
    group = SimpleNamespace(size=lambda: 3, rank=lambda: 0)
    with pytest.raises(UserError, match=r"parallel\.tensor = 3: does not divide 128 channels"):
        TensorParts(group, 5).vector(128)


def test_a_fused_loss_of_a_divided_vocabulary_is_refused():
    config = run_config(train={"fused_loss": "on"})
    with pytest.raises(UserError, match=r"fused_loss = on: parallel\.tensor divides the vocabulary"):
        uses_fused_loss(config, torch.device("cuda"))


@pytest.mark.parametrize(
    ("averaging", "sharding", "parts", "complaint"),
    [
        (4, 2, 2, "averages gradients over 4 rank(s), and 2 hold the same channels"),
        (2, 4, 2, "shards the optimizer over 4 rank(s), and 2 hold the same channels"),
        (2, 2, 1, "knows of 1 part(s) of the model"),
    ],
)
def test_groups_that_deepspeed_does_not_use_are_refused(monkeypatch, averaging, sharding, parts, complaint):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group)
    optimizer = SimpleNamespace(real_dp_process_group=[sharding])
    engine = SimpleNamespace(dp_world_size=averaging, mp_world_size=parts, optimizer=optimizer)
    with pytest.raises(UserError) as error:
        require_groups(engine, Layout(0, 4, tensor=2))
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_the_batch_is_divided_over_groups_of_ranks_and_not_over_ranks():
    config = run_config(train={"batch_size": 6})
    layout = Layout(0, 4, tensor=2)
    assert micro_batching(config, layout.data) == (3, 1)
    assert deepspeed_settings(config, layout)["train_batch_size"] == 6
    with pytest.raises(UserError, match=r"batch_size = 6: must be a multiple of the 4 groups of ranks"):
        micro_batching(config, 4)
