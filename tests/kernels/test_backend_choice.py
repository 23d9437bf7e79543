"""Which backend runs, forced, forbidden or fallen back to, and what is said about it."""

import ctypes
import logging
from pathlib import Path

import pytest
import torch

from spikescale.errors import UserError
from spikescale.kernels import backend as backends
from spikescale.kernels import build
from spikescale.kernels.lif import cpu as lif_cpu
from spikescale.kernels.lif import lif
from spikescale.kernels.wkv import cpu as wkv_cpu
from spikescale.kernels.wkv import wkv

CPU = ("cpu", torch.float32)


@pytest.fixture
def forgotten():
    """Everything announced or loaded before is forgotten, and again afterwards."""
    caches = (backends._announce, backends._warn_slow, lif_cpu.library, wkv_cpu.library)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def no_compiler(forgotten, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_auto_takes_the_widest_compiled_backend_for_cpu_tensors_and_says_so_once(forgotten, caplog):
    widest = f"cpu-{build.instruction_sets()[0]}"
    with caplog.at_level(logging.INFO, "spikescale.kernels"):
        for _ in range(3):
            assert backends.choose_backend("lif", "auto", "cpu", torch.bfloat16) == widest
    said = [record.getMessage() for record in caplog.records if "backend" in record.getMessage()]
    assert said == [f"lif: backend {widest} for bfloat16 tensors on cpu (compiled C++)"]


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float64, "float64"), (torch.float16, "float16")])
def test_auto_takes_the_reference_where_there_is_no_kernel_and_says_why(forgotten, caplog, dtype, reason):
    with caplog.at_level(logging.INFO, "spikescale.kernels"):
        assert backends.choose_backend("wkv", "auto", "cpu", dtype) == "reference"
    assert reason in caplog.text


def test_auto_takes_triton_on_a_gpu_and_warns_where_it_is_not_installed(forgotten, caplog, monkeypatch):
    assert backends.choose_backend("wkv", "auto", "cuda", torch.bfloat16) == "triton"
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    with caplog.at_level(logging.WARNING, "spikescale.kernels"):
        for _ in range(3):
            assert backends.choose_backend("wkv", "auto", "cuda", torch.float32) == "reference"
    assert len(caplog.records) == 1
    assert "slow reference backend: triton is not installed (pip install 'spikescale[gpu]')" in caplog.text
    with pytest.raises(UserError, match="backend 'triton' of wkv: triton is not installed"):
        backends.choose_backend("wkv", "triton", "cuda", torch.float32)


def test_triton_takes_no_cpu_tensors_unless_it_interprets(forgotten, monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    with pytest.raises(UserError, match="takes GPU tensors, not cpu"):
        backends.choose_backend("wkv", "triton", "cpu", torch.float32)
    with pytest.raises(UserError, match="float32, bfloat16 and float16, not float64"):
        backends.choose_backend("wkv", "triton", "cuda", torch.float64)


def test_a_named_instruction_set_is_used_or_refused(forgotten, monkeypatch):
    for name in build.instruction_sets():
        assert backends.choose_backend("lif", f"cpu-{name}", *CPU) == f"cpu-{name}"
    monkeypatch.setattr(backends, "instruction_sets", lambda: ("avx2", "plain"))
    with pytest.raises(UserError, match="'cpu-avx512': this processor has only avx2, plain"):
        backends.choose_backend("lif", "cpu-avx512", *CPU)
    assert backends.choose_backend("lif", "cpu", *CPU) == "cpu-avx2"


def test_a_forced_backend_that_cannot_serve_the_tensors_is_refused():
    with pytest.raises(UserError, match="float32 and bfloat16, not float64"):
        wkv(*(torch.zeros(3, dtype=torch.float64),) * 2, *(torch.zeros(1, 2, 3).double(),) * 2, backend="cpu")
    with pytest.raises(UserError, match="takes CPU tensors, not cuda"):
        backends.choose_backend("lif", "cpu", "cuda", torch.float32)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(
        UserError,
        match="'fast': unknown; there are auto, reference, cpu, cpu-avx512, cpu-avx2, cpu-plain, triton",
    ):
        lif(torch.zeros(1, 1, 1), backend="fast")


def test_without_a_compiler_auto_warns_once_and_computes_with_the_reference(no_compiler, caplog):
    x = torch.tensor([[[2.0], [2.0]]])
    with caplog.at_level(logging.WARNING, "spikescale.kernels"):
        for _ in range(3):
            spikes, _ = lif(x)
    assert spikes.flatten().tolist() == [1.0, 1.0]
    assert len(caplog.records) == 1
    assert "reference" in caplog.text
    assert "no C++ compiler: g++, c++ not found" in caplog.text


def test_without_a_compiler_the_forced_backend_is_an_error(no_compiler):
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        lif(torch.zeros(1, 1, 1), backend="cpu")


def test_a_compiler_that_fails_is_quoted(forgotten, tmp_path, monkeypatch):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'cpu.cpp:1: fatal error: no space left' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"lif/cpu\.cpp.*fatal error: no space left"):
        build.build(Path(lif_cpu.__file__).with_name("cpu.cpp"), compiler=str(broken))


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


PIECES = """
#include "simd.h"
extern "C" void round_bf16(const float* x, unsigned short* y, int n) {
    for (int i = 0; i < n; i++) y[i] = spikescale::from_float<spikescale::bf16>(x[i]).bits;
}
"""


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """The header's rounding alone, compiled."""
    source = tmp_path_factory.mktemp("pieces") / "pieces.cpp"
    source.write_text(PIECES)
    return build.load(source)


def test_bfloat16_rounding_is_torchs(pieces):
    bits = torch.arange(0, 1 << 32, 65537, dtype=torch.int64)
    x = (bits - (1 << 31)).to(torch.int32).view(torch.float32)
    y = torch.empty(x.shape, dtype=torch.int16)
    pieces.round_bf16(address(x), address(y), x.numel())
    ours, torchs = y.view(torch.bfloat16), x.bfloat16()
    assert torch.equal(ours.isnan(), x.isnan())
    number = ~x.isnan()
    assert torch.equal(ours[number], torchs[number])
