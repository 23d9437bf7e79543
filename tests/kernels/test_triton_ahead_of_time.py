"""Every Triton kernel compiles for every target without spilling, as read from the compiled code."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from spikescale.errors import UserError
from spikescale.kernels.ahead_of_time import OPERATORS, TARGETS, compiled_launches, occupancy

LARGER = ("wkv", "lif", "graded_lif", "lif_norm")
SMALLER = ("spike_bits", "layer_norm", "token_mix", "activations")
# Of the larger, what each of TARGETS compiles: options, dtype, and a length of whole blocks or with a rest.
COMBINATIONS = (
    ("plain", "full", "full", "plain"),
    ("float32", "bfloat16", "float32", "bfloat16"),
    ("8 1024 768", "8 1024 768", "2 1000 512", "2 1000 512"),
)

# Calls whose code differs from that of COMBINATIONS: one token, rows that fill the widest program, and
# neurons with a hard reset that gradients do not pass, tau no power of two, thresholds to learn, in float16.
UNUSUAL = """
import json, torch
from spikescale.kernels.ahead_of_time import compiled_launches, operator_calls
from spikescale.kernels.lif.triton import lif_triton

def neurons():
    x, threshold = torch.randn(2, 1000, 512).half().requires_grad_(), torch.ones(512, requires_grad=True)
    spikes, _ = lif_triton(
        x, torch.zeros(2, 512), None, 3.7, threshold, 0.1, False, True, 2.0, form="sequential"
    )
    torch.autograd.grad(spikes, [x, threshold], torch.ones_like(spikes))

def call(operator, shape, dtype, variant):
    return operator_calls(operator, shape, dtype)[variant]

calls = {
    "wkv, one token": call("wkv", (1, 1, 768), torch.bfloat16, "wkv sequential, gate, reset"),
    "lif, one token": call("lif", (1, 1, 768), torch.float32, "lif sequential, soft, learnt, reset"),
    "lif_norm, one token": call("lif_norm", (1, 1, 768), torch.bfloat16, "lif_norm"),
    "lif_norm, wide": call("lif_norm", (1, 256, 1792), torch.bfloat16, "lif_norm"),
    "layer_norm, wide": call("layer_norm", (1, 256, 1792), torch.float32, "layer_norm"),
    "lif, unusual neurons": neurons,
}
for name, call in calls.items():
    for launch in compiled_launches(call, "sm_90", disassemble=False):
        print(json.dumps([name, launch.kernel, launch.spilled_bytes, launch.registers]))
"""

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


def run(*arguments: str) -> str:
    """What a Python process prints that compiles, as this one may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_operators(operators: Sequence[str], target: str, *options: str) -> list[dict]:
    module = ["-m", "spikescale.kernels.ahead_of_time", "--operators", *operators]
    return [json.loads(line) for line in run(*module, "--targets", target, *options).splitlines()]


@pytest.fixture(scope="module")
def launches() -> list[dict]:
    """Launches of all operators, compiled by two processes at a time.

    The larger kernels would take minutes in every combination: each target compiles one of four, each of the
    others another. `benchmarks/kernels_static.py` compiles all.
    """
    with ThreadPoolExecutor(2) as pool:
        larger = [
            pool.submit(
                compile_operators,
                LARGER,
                target,
                "--variants",
                variants,
                "--dtypes",
                dtype,
                "--shape",
                *size.split(),
            )
            for target, variants, dtype, size in zip(TARGETS, *COMBINATIONS, strict=True)
        ]
        smaller = [pool.submit(compile_operators, SMALLER, target) for target in TARGETS]
        return [launch for future in larger + smaller for launch in future.result()]


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
def test_unusual_sizes_and_neurons_do_not_spill_either(tmp_path):
    script = tmp_path / "unusual.py"
    script.write_text(UNUSUAL, encoding="utf-8")
    launches = [json.loads(line) for line in run(str(script)).splitlines()]
    assert {name for name, *_ in launches} >= {"lif, unusual neurons", "lif_norm, wide", "wkv, one token"}
    assert len(launches) >= 16
    for name, kernel, spilled, registers in launches:
        assert spilled == 0, (name, kernel)
        assert 0 < registers <= 255, (name, kernel)


@pytest.mark.slow
def test_a_program_has_as_many_threads_whatever_the_size_of_a_warp(launches):
    threads = {}
    for x in launches:
        if x["operator"] in ("lif", "token_mix", "activations", "spike_bits"):
            lanes = 64 if x["target"] == "gfx942" else 32
            threads.setdefault((x["operator"], x["kernel"]), set()).add(x["num_warps"] * lanes)
    assert all(len(found) == 1 for found in threads.values()), threads
    # One channel of 64 a lane.
    assert {found for key, found in threads.items() if key[0] == "lif" for found in found} == {64}


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_target_and_both_dtypes_are(launches):
    for operator, target in itertools.product(OPERATORS, TARGETS):
        mine = [x for x in launches if x["operator"] == operator]
        here = {x["kernel"] for x in mine if x["target"] == target}
        assert len(here) >= 2
        # A host function launches the same kernels whatever the target.
        assert here == {x["kernel"] for x in mine}, (operator, target)
        assert {x["dtype"] for x in mine} == {"float32", "bfloat16"}


@pytest.mark.slow
def test_a_register_explosion_is_reported_and_no_kernel_runs(tmp_path):
    script = tmp_path / "explosion.py"
    script.write_text(EXPLOSION, encoding="utf-8")
    lines = [line.split(" ", 2) for line in run(str(script)).splitlines()]
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
