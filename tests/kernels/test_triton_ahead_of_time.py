"""Every Triton kernel compiles for every target without spilling, as read from the compiled code."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from spikescale.errors import UserError
from spikescale.kernels.ahead_of_time import OPERATORS, TARGETS, compiled_launches, occupancy

DTYPES = ("float32", "bfloat16")
SPREAD = ("wkv", "lif", "lif_norm")

EXPLOSION = """
import torch, triton, triton.language as tl
from spikescale.kernels.ahead_of_time import compiled_launches

@triton.jit
def hoarding_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    kept = ()
    for n in tl.static_range(8):
        kept = kept + (tl.load(x + n * BLOCK + i),)
    for n in tl.static_range(8):
        tl.store(y + n * BLOCK + i, kept[7 - n] * tl.sum(kept[n]))

@triton.jit
def modest_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))

def call():
    x, y = torch.zeros(32768), torch.zeros(32768)
    hoarding_kernel[(3, 2)](x, y, BLOCK=4096, num_warps=1)
    modest_kernel[lambda meta: (triton.cdiv(32768, meta["BLOCK"]),)](x, y, BLOCK=1024, num_warps=4)
    assert not y.any()

for target in ("sm_90", "gfx942"):
    for launch in compiled_launches(call, target):
        print(launch.target, launch.kernel, launch.grid, launch.spilled_bytes, launch.registers, launch.loops)
"""


def run(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """A Python process that compiles, as this one may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def launches() -> list[dict]:
    """All launches of all operators, by two processes with two targets each."""
    # The larger kernels are compiled for one dtype with all options and for the other without.
    module = ["-m", "spikescale.kernels.ahead_of_time", "--spread", *SPREAD, "--targets"]
    processes = [run([*module, *pair]) for pair in (TARGETS[:2], TARGETS[2:])]
    outputs = [finished(process) for process in processes]
    return [json.loads(line) for output in outputs for line in output.splitlines()]


@pytest.mark.slow
def test_every_kernel_of_every_operator_compiles_without_spilling(launches):
    spilled = [launch for launch in launches if launch["spilled_bytes"]]
    assert not spilled, [
        f"{x['kernel']} ({x['variant']}, {x['dtype']}) on {x['target']}: {x['spilled_bytes']}"
        for x in spilled
    ]
    for launch in launches:
        assert 0 < launch["registers"] <= 255, launch
        assert launch["shared_bytes"] <= 48 * 1024, launch
        assert 0 < launch["occupancy"] <= 1, launch


@pytest.mark.slow
def test_every_operator_is_compiled_forward_and_backward_for_every_target_and_dtype(launches):
    kernels: dict[tuple[str, str, str], set[str]] = {}
    for launch in launches:
        key = (launch["operator"], launch["target"], launch["dtype"])
        kernels.setdefault(key, set()).add(launch["kernel"])
    assert set(kernels) == set(itertools.product(OPERATORS, TARGETS, DTYPES))
    for (operator, target, dtype), names in kernels.items():
        # A host function launches the same kernels whatever the target.
        assert names == kernels[operator, "sm_90", dtype], (operator, target)
        assert len(names) >= 2, (operator, names)


@pytest.mark.slow
def test_a_register_explosion_is_reported_and_no_kernel_runs(tmp_path):
    script = tmp_path / "explosion.py"
    script.write_text(EXPLOSION, encoding="utf-8")
    lines = [line.split(" ", 2) for line in finished(run([str(script)])).splitlines()]
    assert [line[:2] for line in lines] == [
        [target, kernel] for target in ("sm_90", "gfx942") for kernel in ("hoarding_kernel", "modest_kernel")
    ]
    for _, kernel, rest in lines:
        grid, numbers = rest.removeprefix("(").split(") ", 1)
        spilled, registers = (int(number) for number in numbers.split(" ")[:2])
        if kernel == "hoarding_kernel":
            assert grid == "3, 2, 1"
            assert spilled > 0
        else:
            assert grid == "32, 1, 1"
            assert spilled == 0
            assert registers < 40


def test_an_interpreting_process_and_an_unknown_target_are_refused():
    with pytest.raises(UserError, match="sm_70"):
        compiled_launches(lambda: None, "sm_70")
    if os.environ.get("TRITON_INTERPRET") == "1":
        with pytest.raises(UserError, match="cannot compile"):
            compiled_launches(lambda: None, "sm_90")


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "expected"),
    [
        ("sm_80", 32, 0, 4, 1.0),
        ("sm_80", 33, 0, 4, 48 / 64),
        ("sm_90", 64, 0, 4, 32 / 64),
        ("sm_90", 255, 0, 4, 8 / 64),
        ("sm_90", 16, 0, 1, 32 / 64),  # 32 programs of one warp
        ("sm_80", 32, 48 * 1024, 4, 12 / 64),  # three times 48 + 1 KiB
        ("sm_90", 32, 48 * 1024, 4, 16 / 64),
        ("sm_100", 40, 0, 8, 48 / 64),
        ("gfx942", 64, 0, 4, 1.0),
        ("gfx942", 65, 0, 4, 28 / 32),
        ("gfx942", 256, 0, 4, 8 / 32),
        ("gfx942", 32, 32 * 1024, 4, 8 / 32),
    ],
)
def test_occupancy_follows_the_documented_rules(target, registers, shared, num_warps, expected):
    assert occupancy(target, registers, shared, num_warps) == expected
