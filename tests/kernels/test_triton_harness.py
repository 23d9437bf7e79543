"""The checks that tests of Triton kernels rely on catch what they are for."""

import importlib
import os

import pytest
import torch
import triton
import triton.language as tl
from triton_harness import MemoryViolation, bf16_rounding, checked_memory, mutated

from spikescale.kernels.activations import squared_relu

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: run pytest without -m gpu"
)


@triton.jit
def scale_kernel(x, y, n, masked: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    if masked:
        tl.store(y + i, value * 2, mask=i < n)
    else:
        tl.store(y + i, value * 2)


@triton.jit
def overlapping_kernel(y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(y + i, i, mask=i < n)


@triton.jit
def cumulative_kernel(y):
    i = tl.program_id(0)
    tl.store(y + i + 1, tl.load(y + i) + 1)


@triton.jit
def counting_kernel(y):
    tl.atomic_add(y, 1.0)


@triton.jit
def atomic_beside_load_kernel(y, z):
    tl.atomic_add(y, 1.0)
    tl.store(z + tl.program_id(0), tl.load(y))


@triton.jit
def order_kernel(y):
    i = tl.program_id(0)
    tl.store(y + i, i)


@triton.jit
def _inner(y, i):
    tl.store(y + i, 1.0)


@triton.jit
def nested_kernel(y, n):
    _inner(y, n + tl.program_id(0))


@triton.jit
def cast_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@pytest.mark.parametrize("seed", range(3))
def test_a_correct_kernel_passes_and_computes_as_unchecked(seed):
    x = torch.randn(100)
    y = torch.empty_like(x)
    with checked_memory(seed):
        scale_kernel[(4,)](x, y, 100, True, BLOCK=32)
    assert torch.equal(y, 2 * x)


def test_a_store_past_the_end_is_caught_and_named():
    storage = torch.zeros(4096)
    x, y = storage[:100].clone(), storage[:100].clone()
    with (
        checked_memory(0),
        pytest.raises(AssertionError, match=r"scale_kernel: .* stores outside .* 28 lanes"),
    ):
        scale_kernel[(4,)](x, y, 100, False, BLOCK=32)


def test_a_load_past_the_end_is_caught():
    with checked_memory(0), pytest.raises(MemoryViolation, match="loads outside"):
        scale_kernel[(4,)](torch.zeros(100), torch.zeros(128), 101, True, BLOCK=32)


def test_a_violation_inside_a_device_function_is_caught():
    with checked_memory(0), pytest.raises(MemoryViolation, match=r"nested_kernel: program \(0, 0, 0\)"):
        nested_kernel[(1,)](torch.zeros(8), 8)


@pytest.mark.parametrize("seed", range(3))
def test_two_programs_storing_to_one_address_are_caught(seed):
    with (
        checked_memory(seed),
        pytest.raises(AssertionError, match=r"overlapping_kernel: .* stores where program"),
    ):
        overlapping_kernel[(4,)](torch.empty(64, dtype=torch.int32), 64, BLOCK=16)


@pytest.mark.parametrize("seed", range(5))
def test_a_program_that_needs_another_to_run_first_is_caught(seed):
    y = torch.zeros(9)
    with (
        checked_memory(seed),
        pytest.raises(AssertionError, match=r"cumulative_kernel: .*(loads what|stores what)"),
    ):
        cumulative_kernel[(8,)](y)
    cumulative_kernel[(8,)](y)
    assert y[-1] == 8  # unchecked and in order, it looks right


def test_atomic_operations_may_meet_each_other_but_no_plain_access():
    total = torch.zeros(1)
    with checked_memory(0):
        counting_kernel[(8,)](total)
        assert total.item() == 8
        with pytest.raises(MemoryViolation, match="atomic_beside_load_kernel"):
            atomic_beside_load_kernel[(8,)](total, torch.empty(8))


def test_programs_run_in_a_shuffled_order_and_all_of_them_once(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    seen = []
    original = InterpreterBuilder.create_get_program_id
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_get_program_id",
        lambda self, axis: (seen.append(self.grid_idx), original(self, axis))[1],
    )
    orders = []
    for seed in range(2):
        seen.clear()
        with checked_memory(seed):
            order_kernel[(12,)](torch.empty(12, dtype=torch.int32))
        orders.append(list(seen))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == [(i, 0, 0) for i in range(12)]


def test_memory_that_no_program_stores_is_nan():
    with checked_memory(0):
        y = torch.empty(100)
        scale_kernel[(2,)](torch.ones(100), y, 100, True, BLOCK=32)
    assert y[:64].eq(2).all()
    assert y[64:].isnan().all()


def test_views_of_one_storage_are_checked_as_one():
    x = torch.arange(64.0)
    with checked_memory(0), pytest.raises(MemoryViolation, match="scale_kernel"):
        scale_kernel[(2,)](x[:48], x[16:], 48, True, BLOCK=32)
    even, odd = x[::2], torch.empty(100)[:64]
    with checked_memory(0):
        scale_kernel[(2,)](even, odd, 64, True, BLOCK=32)
    assert torch.equal(odd, 2 * x)


def test_bfloat16_is_rounded_to_the_nearest_even():
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40]
    )
    x = torch.cat([special, torch.randn(1000, generator=generator)])
    y = torch.empty(len(x), dtype=torch.bfloat16)
    with bf16_rounding():
        cast_kernel[(1,)](x, y, len(x), BLOCK=1024)
    expected = x.to(torch.bfloat16)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
    cast_kernel[(1,)](x, y, len(x), BLOCK=1024)
    assert not torch.equal(y.nan_to_num(7), expected.nan_to_num(7))


def test_a_mutant_is_a_module_of_its_own_and_leaves_no_trace():
    name = "spikescale.kernels.activations.triton"
    original = importlib.import_module(name)
    x = torch.tensor([-1.0, 3.0])
    with mutated(name, "positive * positive", "positive * positive + 1") as mutant:
        assert mutant is not original
        assert squared_relu(x, backend="triton").tolist() == [1, 10]
    assert importlib.import_module(name) is original
    assert squared_relu(x, backend="triton").tolist() == [0, 9]


@pytest.mark.parametrize("old", ["tl.load", "no such line"])
def test_a_mutation_that_is_not_one_place_is_refused(old):
    with (
        pytest.raises(ValueError, match="times, not once"),
        mutated("spikescale.kernels.activations.triton", old, ""),
    ):
        pass
