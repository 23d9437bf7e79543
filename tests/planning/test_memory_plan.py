"""Bytes of a rank by stage, offload and layout."""

from pathlib import Path

import pytest
from workloads import workload

from spikescale.errors import UserError
from spikescale.planning.choice import assess, candidates, recommend
from spikescale.planning.devices import DEVICES, GIB, find_device
from spikescale.planning.memory import plan_memory
from spikescale.planning.parameters import count

WEIGHTS = 4 * 215_399_424


def parts(plan, phase):
    return next(p for p in plan.phases if p.name == phase)


@pytest.mark.parametrize(
    ("stage", "weights", "optimizer"), [(0, 1, 2), (1, 1, 3 / 4), (2, 1, 3 / 4), (3, None, 3 / 4)]
)
def test_states_of_each_stage_over_four_ranks(stage, weights, optimizer):
    step = parts(plan_memory(workload(ranks=4, stage=stage)), "step").device
    assert step["optimizer"] == pytest.approx(optimizer * WEIGHTS, rel=1e-6)
    assert step["weights"] == pytest.approx((weights or 1 / 4) * WEIGHTS, rel=1e-6)


def test_whole_gradients_exist_up_to_stage_1_and_a_part_from_stage_2():
    ends = [parts(plan_memory(workload(ranks=8, stage=stage)), "backward ends") for stage in range(4)]
    largest = 4 * 50277 * 768
    assert [phase.device["gradients"] for phase in ends] == [WEIGHTS, WEIGHTS, largest, largest]
    assert [phase.device.get("partition", 0) for phase in ends] == [0, 0, WEIGHTS / 8, WEIGHTS / 8]


def test_accumulated_gradients_are_there_while_the_loss_is_computed():
    for stage, held in ((0, WEIGHTS), (1, WEIGHTS), (2, WEIGHTS / 2), (3, WEIGHTS / 2)):
        one, two = (
            parts(plan_memory(workload(ranks=2, stage=stage, accumulation=passes)), "loss").device
            for passes in (1, 2)
        )
        more = sum(two.get(key, 0) - one.get(key, 0) for key in ("gradients", "partition"))
        assert more == pytest.approx(held if stage < 3 else 0, abs=8)  # stage 3 holds them always


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_the_optimizer_to_the_host(stage):
    kept = plan_memory(workload("1b2", ranks=2, stage=stage))
    moved = plan_memory(workload("1b2", ranks=2, stage=stage, offload_optimizer="cpu"))
    shard = 2 * count(workload("1b2").model)
    assert parts(kept, "step").device["optimizer"] == pytest.approx(3 * shard, rel=1e-6)
    assert "optimizer" not in parts(moved, "step").device
    assert parts(moved, "step").host["optimizer"] == pytest.approx(3 * shard, rel=1e-6)
    assert moved.device_bytes < kept.device_bytes
    assert moved.host_bytes > kept.host_bytes


def test_an_nvme_takes_the_optimizer_out_of_host_memory():
    place = {"offload_parameters": "cpu", "nvme_path": Path("/nvme")}
    on_cpu = plan_memory(workload("1b2", stage=3, offload_optimizer="cpu", offload_parameters="cpu"))
    on_disk = plan_memory(workload("1b2", stage=3, offload_optimizer="nvme", **place))
    assert on_disk.host_bytes < 0.8 * on_cpu.host_bytes
    assert on_disk.disk == 16 * count(workload("1b2").model)
    assert on_cpu.disk == 0


def test_offload_on_a_machine_without_gpus_saves_nothing():
    plans = [
        plan_memory(workload(stage=2, on_cpu=True, offload_optimizer=place)).device_bytes
        for place in ("none", "cpu")
    ]
    assert plans[1] >= plans[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_never_need_more_each(stage):
    sizes = [
        plan_memory(workload("1b2", ranks=ranks, stage=stage, activation_checkpointing=True)).device_bytes
        for ranks in (2, 4, 8, 64)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


def test_longer_batches_need_more_and_recomputation_less():
    sizes = [plan_memory(workload(micro=micro)).device_bytes for micro in (8, 16, 32)]
    assert sizes == sorted(sizes)
    recomputed = plan_memory(workload(micro=32, activation_checkpointing=True))
    assert recomputed.device_bytes < sizes[-1] / 2


def test_tensor_and_context_ranks_need_less_each():
    whole = plan_memory(workload("1b2", ranks=8, stage=1, micro=4))
    for key in ("tensor", "context"):
        divided = plan_memory(workload("1b2", ranks=8, stage=1, micro=4, **{key: 4}))
        assert divided.device_bytes < 0.75 * whole.device_bytes


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"ranks": 3, "tensor": 2}, "parallel.tensor = 2: does not divide the 3"),
        ({"ranks": 4, "batch_size": 6}, "batch size 6: must be a multiple of the 4"),
        ({"micro_batch_size": 3, "batch_size": 4}, "micro-batch size 3: must divide the 4"),
        ({"ranks": 2, "stage": 3, "tensor": 2}, "does not work with stage 3"),
        ({"ranks": 2, "stage": 2, "context": 2}, "do not work with stage 2"),
        ({"ranks": 5, "tensor": 5}, "does not divide the width 768"),
        ({"ranks": 3, "context": 3}, "does not divide the context of 1024"),
    ],
)
def test_what_cannot_be_run_is_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        plan_memory(workload(**settings))


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="h100, a100-80"):
        find_device("abacus")


def test_the_recommendation_is_the_fastest_that_fits():
    device = DEVICES["a100-80"]
    work = workload("1b2", ranks=8, micro=4, activation_checkpointing=True)
    found = candidates(work, device, device.memory, None, (0, 1, 2, 3))
    names = [candidate.name for candidate in found]
    assert names == ["0", "1", "1-cpu", "2", "2-cpu", "3", "3-cpu", "3-nvme"]
    chosen = recommend(found)
    assert chosen is not None
    assert chosen.zero.offload_optimizer == "none"
    for candidate in found:
        if candidate.fits and candidate.zero.offload_optimizer == "none":
            assert chosen.throughput.seconds <= candidate.throughput.seconds + 1e-3


def test_offload_is_recommended_only_where_nothing_else_fits():
    device = DEVICES["rtx4090"]
    work = workload("1b2", micro=2, activation_checkpointing=True)
    roomy = recommend(candidates(work, device, 80 * GIB, None, (0, 1, 2, 3)))
    tight = recommend(candidates(work, device, 20 * GIB, None, (0, 1, 2, 3)))
    hopeless = recommend(candidates(work, device, 2 * GIB, None, (0, 1, 2, 3)))
    assert roomy is not None and roomy.zero.offload_optimizer == "none"
    assert tight is not None and tight.zero.offload_optimizer == "cpu"
    assert hopeless is None


def test_host_memory_counts_when_it_is_given():
    device = DEVICES["rtx4090"]
    work = workload("1b2", stage=2, offload_optimizer="cpu", activation_checkpointing=True)
    assert assess(work, device, device.memory, None).fits
    assert not assess(work, device, device.memory, 8 * GIB).fits


def test_speed_falls_with_recomputation_and_with_a_slower_link():
    device = DEVICES["h100"]
    work = workload("216m", ranks=8, micro=8, stage=2)
    again = workload("216m", ranks=8, micro=8, stage=2, activation_checkpointing=True)
    plain, slower = (assess(w, device, device.memory, None).throughput for w in (work, again))
    assert plain.tokens_per_second > slower.tokens_per_second
    # Averaged in all ranks (2 x 7/8), then gathered (7/8), 4 bytes each.
    assert plain.link_bytes == pytest.approx(3 * 7 / 8 * WEIGHTS)
    assert plain.days(1e9) == pytest.approx(1e9 / plain.tokens_per_second / 86400)
