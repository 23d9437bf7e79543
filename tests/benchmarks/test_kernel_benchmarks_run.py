"""The benchmarks of the kernels run end to end, at sizes at which their times mean nothing."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spikescale.errors import UserError
from spikescale.kernels.ahead_of_time import OPERATORS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Runs a benchmark's `main` in this process; its results, and what it printed is left to `capsys`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads, output = torch.get_num_threads(), tmp_path / "result.json"

    def call(name: str, *words: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--output", str(output)])
        importlib.import_module(name).main()
        return json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}

    yield call
    torch.set_num_threads(threads)


def test_kernels_cpu_compares_every_operator_with_its_limit_and_target(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spikescale.training.allocator.keep_freed_memory", lambda: None)
    results = run("kernels_cpu", "--quick", "--threads", "1")
    for name, timings in results["timings"].items():
        assert len(timings) == 1 + 2 * 10
        for what, row in timings.items():
            assert row["times_limit"] == pytest.approx(row["median_seconds"] / row["limit_seconds"])
            has_target = name == "float32" and what.rpartition(" ")[0] in ("wkv", "lif")
            assert (row["meets_target"] is not None) == has_target, (name, what)
    kernels_cpu = importlib.import_module("kernels_cpu")
    met = kernels_cpu.meets_target
    assert met("wkv forward", torch.float32, 2.5, 9.0) and met("lif backward", torch.float32, 9.0, 1.5)
    assert met("wkv forward", torch.float32, 2.51, 1.51) is False
    assert met("wkv gated forward", torch.float32, 1.0, 1.0) is None
    printed = capsys.readouterr().out
    ratio = results["timings"]["float32"]["copy"]["times_limit"]
    assert ratio == pytest.approx(1.0)
    assert " 1.00 " in printed


def test_streaming_names_the_nearer_limit_of_every_contender(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> Any:
        raise UserError(f"no {name}")

    monkeypatch.setattr(importlib.import_module("streaming"), "peer", refuse)
    results = run("streaming", "--quick", "--threads", "1", "--presets", "46m")
    assert [table["batch"] for table in results["tables"]] == [1, 3]
    for table in results["tables"]:
        assert {"GPT-2", "RWKV-4"} <= set(table["not_run"])
        names = [row["name"] for row in table["contenders"]]
        assert ("spikescale, zeros skipped" in names) == (table["batch"] == 1)
        assert {"spikescale", "spikescale, torch engine"} <= set(names)
        for row in table["contenders"]:
            limits = {kind: row[f"{kind}_limit_seconds"] for kind in ("memory", "arithmetic")}
            assert limits[row["nearer_limit"]] == max(limits.values())
            share = max(limits.values()) / row["median_seconds"]
            assert row["share_of_nearer_limit"] == pytest.approx(share)
    assert [row["position"] for row in results["long_context"]["positions"]] == [64, 256]


def test_every_variant_of_every_operator_has_its_fewest_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    static = importlib.import_module("kernels_static")
    variants = static.all_calls(OPERATORS, (1, 3, 64), torch.float32, (1, 3, 64))
    assert {name.split(" ")[0].strip(",") for name in variants} >= {"wkv", "lif", "graded_lif", "lif_norm"}
    for name in variants:
        assert 0 < static.fewest_bytes(name, 2) < static.fewest_bytes(name, 4)


def test_kernels_gpu_without_a_gpu_says_so_and_writes_nothing(
    run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("kernels_gpu") == {}
    assert capsys.readouterr().out == "no GPU: nothing measured\n"


@pytest.fixture
def interpreted_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`kernels_gpu` on the CPU: kernels interpreted, a second for every call."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("kernels_gpu")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "SHAPES", [(1, 3, 4)])
    monkeypatch.setattr(module, "_seconds", lambda call, repeats: float(call() is not None))
    # What it imports asks for a GPU's properties where there seems to be one.
    importlib.import_module("spikescale.kernels.layer_norm.triton")
    # Its own functions need a GPU to tune themselves on.
    monkeypatch.setattr(module, "_fla", lambda *_: {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    return module


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Triton is not supported")
def test_kernels_gpu_shows_what_a_peer_differs_by_and_goes_on(
    run: Any, interpreted_gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = interpreted_gpu.operations

    def with_a_wrong_peer(*arguments: Any) -> Any:
        operations = original(*arguments)
        operations["squared_relu"].implementations["fla"] = lambda x: [1.5 * x.relu().square()]
        return operations

    monkeypatch.setattr(interpreted_gpu, "operations", with_a_wrong_peer)
    results = run("kernels_gpu", "--dtypes", "float32")
    first = results["float32, B 1, T 3, C 4"]["operations"]
    assert first["squared_relu forward, fla"]["difference"] == pytest.approx(0.5)
    assert first["squared_relu forward, spikescale"]["difference"] < 1e-5
    assert "5.0e-01" in capsys.readouterr().out
    neurons, others = ("lif", "graded_lif", "lif_norm"), ("wkv", "layer_norm", "token_mix")
    assert {key.split(",")[0] for key in first} == {
        f"{name} {way}"
        for name in (*neurons, *others, "squared_relu", "sigmoid_gate")
        for way in ("forward", "backward")
    }


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_kernels_gpu_ends_where_its_own_kernels_differ_and_keeps_the_shapes_before(
    run: Any, interpreted_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = interpreted_gpu.operations

    def wrong_from_the_second_shape_on(shape: tuple[int, int, int], dtype: torch.dtype) -> Any:
        operation = original(shape, dtype)["squared_relu"]
        ours = operation.implementations["spikescale"]
        factor = 1 if shape == (1, 3, 4) else 2
        operation.implementations["spikescale"] = lambda x: [factor * ours(x)[0]]
        return {"squared_relu": operation}

    monkeypatch.setattr(interpreted_gpu, "SHAPES", [(1, 3, 4), (1, 5, 4)])
    monkeypatch.setattr(interpreted_gpu, "operations", wrong_from_the_second_shape_on)
    with pytest.raises(SystemExit, match="spikescale: result 0 differs from torch's by"):
        run("kernels_gpu", "--dtypes", "float32")
    written = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert "float32, B 1, T 3, C 4" in written and "float32, B 1, T 5, C 4" not in written


@pytest.mark.slow
def test_kernels_static_reports_what_is_compiled_and_counted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    output = tmp_path / "result.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "kernels_static.py"), "--quick", "--output", str(output)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    operators = json.loads(output.read_text(encoding="utf-8"))["operators"]
    assert set(operators) == {"squared_relu, float32", "sigmoid_gate, float32"}
    for result in operators.values():
        assert result["bytes_per_element"] == pytest.approx(result["fewest_bytes_per_element"])
        for launch in result["launches"]:
            assert launch["bytes_per_element"] == pytest.approx(launch["bytes_per_element_by_formula"])
            assert set(launch["targets"]) == {"sm_80", "sm_90", "sm_100", "gfx942"}
