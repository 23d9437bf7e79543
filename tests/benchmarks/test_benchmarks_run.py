"""The benchmarks of whole training steps run end to end, and compare what they say they compare."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from spikescale.config import ModelConfig
from spikescale.errors import UserError
from spikescale.kernels.wkv import wkv
from spikescale.model import SpikeGPT

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK_TOKENS = 2 * 32
SPIKINGJELLY = "spikingjelly.activation_based.neuron"
SMALL = ModelConfig(layers=2, width=32, vocab_size=256, context_length=32)


def run_benchmark(script: str, tmp_path: Path, *words: str) -> dict[str, Any]:
    """Run a benchmark with --quick on one thread, and return the JSON that it wrote."""
    output = tmp_path / "results" / "result.json"
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--threads", "1", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def imports(module: str) -> bool:
    """Whether a peer's module can be imported here."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


@pytest.mark.slow
def test_train_step_reports_rates_memory_growth_and_profile(tmp_path: Path) -> None:
    rows = ("gemm", "spikegpt", "spikegpt-checkpointed", "checkpointed-counts", "checkpointed-floats")
    results = run_benchmark("train_step.py", tmp_path, "--profile", "--rows", *rows)
    assert set(results["rows"]) == set(rows)
    for name in rows:
        row = results["rows"][name]
        assert row["tokens_per_second"] == pytest.approx(QUICK_TOKENS / row["median_seconds"])
        assert row["fastest_seconds"] <= row["median_seconds"] <= row["slowest_seconds"]
    ours = results["rows"]["spikegpt"]
    floor = results["rows"]["gemm"]
    assert ours["share_of_floor"] == pytest.approx(floor["median_seconds"] / ours["median_seconds"])
    assert floor["times_slower_than_spikegpt"] == pytest.approx(ours["share_of_floor"])
    assert ours["parameters"] == SpikeGPT(SMALL).count_parameters()
    # Gradients and two moments a weight, and what the activations add.
    assert ours["step_bytes"] >= ours["activation_bytes"] > 0
    assert [(point["length"], point["layers"]) for point in results["growth"]] == [(64, 2), (32, 2)]
    assert all(point["bytes"] > 0 and point["checkpointed_bytes"] > 0 for point in results["growth"])
    groups = results["profile"]["groups"]
    assert sum(groups.values()) == pytest.approx(results["profile"]["seconds"])
    for group in (
        "linear",
        "wkv",
        "lif, norm, dropout",
        "token mix",
        "head and loss",
        "optimizer and clipping",
    ):
        assert groups[group] > 0, group
    assert results["skipped"] == {}


@pytest.mark.slow
def test_peers_take_the_same_step(tmp_path: Path) -> None:
    modules = {"gpt2": "transformers", "rwkv": "transformers", "spikingjelly": SPIKINGJELLY}
    names = [name for name, module in modules.items() if imports(module)]
    if not names:
        pytest.skip("no peer is installed (extra bench)")
    results = run_benchmark("train_step.py", tmp_path, "--parts", "time", "--rows", "spikegpt", *modules)
    assert set(results["rows"]) == {"spikegpt", *names}
    assert set(results["skipped"]) == modules.keys() - set(names)
    ours = results["rows"]["spikegpt"]
    for name in names:
        row = results["rows"][name]
        ratio = ours["tokens_per_second"] / row["tokens_per_second"]
        assert row["times_slower_than_spikegpt"] == pytest.approx(ratio)
        # The same depth, width and vocabulary; GPT-2 ties its head and has positions and biases.
        assert row["parameters"] == pytest.approx(ours["parameters"], rel=0.5 if name == "gpt2" else 1e-9)


@pytest.mark.parametrize(
    ("name", "variant", "checkpointing", "compact"),
    [
        ("checkpointed-counts", "spikegpt", True, True),
        ("checkpointed-floats", "spikegpt", True, False),
        ("driven-bits", "spikegpt-driven", False, True),
        ("driven-numbers", "spikegpt-driven", False, False),
    ],
)
def test_rows_of_what_spikes_save_differ_in_what_is_kept_alone(
    benchmark: Any, name: str, variant: str, checkpointing: bool, compact: bool
) -> None:
    model = benchmark("peers").MODELS[name](SMALL).model
    assert (model.config.variant, model.config.dropout) == (variant, 0.0)
    assert (model.activation_checkpointing, model.compact_activations) == (checkpointing, compact)
    assert name in benchmark("train_step").TITLES


def test_missing_peer_is_named_and_the_others_run(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, train_step = benchmark("peers"), benchmark("train_step")

    def refuse(name: str) -> ModuleType:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(peers.importlib, "import_module", refuse)
    steps, skipped = train_step.build(["gemm", "spikegpt", "gpt2", "spikingjelly"], SMALL, QUICK_TOKENS)
    assert list(steps) == ["gemm", "spikegpt"]
    assert list(skipped) == ["gpt2", "spikingjelly"]
    assert "transformers" in skipped["gpt2"]


def test_floor_is_every_projection_forward_and_twice_backward(benchmark: Any) -> None:
    floor = benchmark("peers").GemmFloor(SMALL, tokens=10)
    projections = [
        parameter
        for name, parameter in SpikeGPT(SMALL).named_parameters()
        if parameter.dim() == 2 and name != "embedding.weight"
    ]
    assert floor.operations == 10 * 6 * sum(parameter.numel() for parameter in projections)
    shapes = sorted(tuple(parameter.shape) for parameter in projections)
    assert sorted(tuple(weight.shape) for weight in floor.weights) == shapes


def test_loop_wkv_is_wkv(benchmark: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 33, 5, generator=generator) * 10 for _ in range(2))
    w, u = -torch.rand(5, generator=generator), torch.randn(5, generator=generator)
    expected, _ = wkv(w, u, k, v, backend="reference")
    torch.testing.assert_close(benchmark("peers").loop_wkv(w, u, k, v), expected, rtol=1e-5, atol=1e-5)


def test_spikingjelly_row_computes_the_same_model(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(SPIKINGJELLY, exc_type=ImportError)
    peers = benchmark("peers")
    assert peers.check_agreement(SMALL) <= 0.1
    monkeypatch.setattr(peers, "loop_wkv", lambda w, u, k, v: v)
    with pytest.raises(UserError, match="disagree"):
        peers.check_agreement(SMALL)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
def test_peak_is_that_since_the_reset() -> None:
    # In a process of its own: this one may hold memory that earlier tests freed.
    program = """if True:
        import common, torch
        torch.ones(50_000_000)
        common.reset_peak()
        before = common.resident_bytes()
        print(common.peak_bytes() - before)
        torch.ones(25_000_000)
        print(common.peak_bytes() - before)"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    at_reset, later = (float(line) for line in done.stdout.split())
    assert at_reset < 10e6
    assert later == pytest.approx(100e6, rel=0.1)


@pytest.mark.slow
def test_long_context_reports_every_length_and_position(tmp_path: Path) -> None:
    results = run_benchmark("long_context.py", tmp_path)
    assert {length: row["batch"] for length, row in results["training"].items()} == {"64": 4, "256": 1}
    for row in results["training"].values():
        assert row["seconds_token"]["median_seconds"] > 0
        assert row["activation_bytes_token"] > 0
    states = {row["state_bytes"] for row in results["streaming"].values()}
    assert set(results["streaming"]) == {"64", "256"}
    assert len(states) == 1 and states.pop() > 0
    assert (tmp_path / "results" / "result.png").read_bytes().startswith(b"\x89PNG")


def test_long_context_refuses_a_length_that_does_not_divide_the_tokens(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["long_context.py", "--tokens", "100", "--lengths", "30"])
    with pytest.raises(SystemExit):
        benchmark("long_context").parse()
    error = capsys.readouterr().err
    assert error.splitlines()[-1].endswith("--tokens 100 is no multiple of --lengths 30")
