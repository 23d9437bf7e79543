"""State off the device: what DeepSpeed is told, what is refused, and that training stays the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT
from pydantic import ValidationError

from spikescale.config import DataConfig, ModelConfig, RunConfig, TrainConfig, ZeroConfig
from spikescale.config.load import preset_names, read_preset
from spikescale.errors import UserError
from spikescale.parallel import Layout
from spikescale.training import offload
from spikescale.training.bootstrap import Process
from spikescale.training.engine import build_optimizer, deepspeed_settings
from spikescale.training.offload import describe_offload, optimizer_class, require_offload, sharding_settings

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config_of(optimizer="adam", **zero) -> RunConfig:
    return RunConfig(
        data=DataConfig(path=Path("none")),
        model=ModelConfig(layers=1, width=8, vocab_size=100),
        train=TrainConfig(batch_size=4, optimizer=optimizer),
        zero=ZeroConfig(**zero),
    )


def process_on(device=CPU) -> Process:
    return Process(0, 1, 0, 1, device)


def zero_block(config, ranks=2):
    settings = deepspeed_settings(config, Layout.of(config.parallel, 0, ranks))
    assert settings["zero_force_ds_cpu_optimizer"] is False
    return settings["zero_optimization"]


def test_without_offload_nothing_is_moved():
    for stage in range(4):
        assert not any("offload" in key for key in zero_block(config_of(stage=stage)))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_on_the_cpu(stage):
    block = zero_block(config_of(stage=stage, offload_optimizer="cpu"))
    assert block["offload_optimizer"] == {"device": "cpu"}
    assert "offload_param" not in block


def test_everything_on_disk_or_host(tmp_path):
    place = {"offload_optimizer": "nvme", "nvme_path": tmp_path, "reduce_bucket_size": 1000}
    block = zero_block(config_of(stage=3, offload_parameters="cpu", **place))
    assert block["offload_optimizer"] == {"device": "nvme", "nvme_path": str(tmp_path)}
    assert block["offload_param"] == {"device": "cpu"}
    assert block["sub_group_size"] == 1000


def test_weights_on_disk_get_buffers_for_the_largest(tmp_path):
    config = config_of(stage=3, offload_parameters="nvme", nvme_path=tmp_path)
    place = zero_block(config)["offload_param"]
    assert place["device"] == "nvme"
    assert place["buffer_size"] == 100 * 8 // 2  # the embedding's part of two ranks


def test_stage_3_keeps_no_more_weights_gathered_than_its_buckets_say():
    block = sharding_settings(config_of(stage=3, allgather_bucket_size=1000), 2)
    assert block["stage3_prefetch_bucket_size"] == 1000
    assert block["stage3_max_live_parameters"] == block["stage3_max_reuse_distance"] == 5000


@pytest.mark.parametrize(("name", "decoupled"), [("adam", False), ("adamw", True)])
def test_which_adam_updates_the_state(name, decoupled):
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    plain, moved = config_of(name, stage=2), config_of(name, stage=2, offload_optimizer="cpu")
    for config, device in ((plain, CPU), (plain, GPU), (moved, CPU)):
        assert optimizer_class(config, device) == (kind, {"fused": True})
    chosen, own = optimizer_class(moved, GPU)
    assert (chosen.__name__, own) == ("DeepSpeedCPUAdam", {"adamw_mode": decoupled})
    model = torch.nn.Linear(2, 2)
    assert type(build_optimizer(model, moved, CPU)) is kind


def test_the_choice_is_said():
    assert describe_offload(config_of(stage=2), GPU) == ""
    words = describe_offload(config_of(stage=3, offload_optimizer="cpu", offload_parameters="cpu"), GPU)
    assert words == " with optimizer on cpu (DeepSpeedCPUAdam), weights on cpu"
    assert "(Adam)" in describe_offload(config_of(stage=1, offload_optimizer="cpu"), CPU)


def test_every_preset_of_zero_is_valid():
    names = preset_names("zero")
    assert {"stage1-cpu", "stage2-cpu", "stage3-cpu", "stage3-nvme"} <= set(names)
    for name in names:
        settings = dict(read_preset("zero", name))
        if name.endswith("nvme"):
            with pytest.raises(ValidationError, match="nvme_path is missing"):
                ZeroConfig(**settings)
            settings["nvme_path"] = Path("/somewhere")
        zero = ZeroConfig(**settings)
        assert name.startswith(f"stage{zero.stage}")
        assert name.endswith(zero.offload_optimizer) or zero.offload_optimizer == "none"


def test_nvme_without_libaio_is_refused_by_name(tmp_path, monkeypatch):
    import deepspeed.ops.op_builder as builders

    monkeypatch.setattr(builders.AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    config = config_of(stage=3, offload_optimizer="nvme", nvme_path=tmp_path)
    with pytest.raises(UserError, match=r"zero.offload_optimizer = nvme: needs libaio .*libaio-dev"):
        require_offload(config, process_on())


def test_weights_on_disk_are_refused_where_deepspeed_would_round_them(tmp_path):
    config = config_of(stage=3, offload_parameters="nvme", nvme_path=tmp_path)
    with pytest.raises(UserError, match=r"offload_parameters = nvme.*use cpu or none"):
        require_offload(config, process_on(CPU))


def test_cpu_adam_without_a_compiler_is_refused(monkeypatch):
    import deepspeed.ops.op_builder as builders

    monkeypatch.setattr(builders.CPUAdamBuilder, "is_compatible", lambda self, verbose=False: False)
    config = config_of(stage=2, offload_optimizer="cpu")
    with pytest.raises(UserError, match="C\\+\\+ compiler and ninja"):
        require_offload(config, process_on(GPU))
    require_offload(config, process_on(CPU))  # torch's own Adam needs neither


@pytest.mark.parametrize("missing", [True, False])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, monkeypatch, missing):
    path = tmp_path / "nvme"
    if not missing:
        path.mkdir()
        monkeypatch.setattr(offload.os, "access", lambda *_: False)
    config = config_of(stage=3, offload_optimizer="nvme", nvme_path=path)
    with pytest.raises(UserError, match="no such folder" if missing else "not writable"):
        require_offload(config, process_on())


@pytest.fixture(scope="module")
def offloaded_losses():
    """Losses of 20 steps of two ranks, by case, and of plain torch."""
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    command.append(str(Path(__file__).with_name("offload_cases.py")))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"plain"')))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", ["1-cpu", "2-cpu", "2-cpu-accumulating", "3-cpu", "3-small-buckets"])
def test_offloaded_ranks_follow_plain_torch(offloaded_losses, case):
    plain, moved = offloaded_losses["plain"], offloaded_losses[case]
    assert len(plain) == len(moved) == 20
    assert plain[-1] < plain[0] - 0.5
    assert max(abs(a - b) for a, b in zip(plain, moved, strict=True)) < 1e-4
