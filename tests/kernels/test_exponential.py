"""The exponentials of the C++ kernels, for every instruction set, against float64 over all their range."""

import ctypes
import functools
import math

import pytest
import torch

from spikescale.kernels import build

SOURCE = """
#include "simd.h"
#include "wkv_vector.h"

using namespace spikescale::wkv;

template <typename Exp>
static void each(const float* x, float* y, long n, Exp exp) {
    for (long i = 0; i < n; i += WIDTH) {
        const int left = n - i < WIDTH ? int(n - i) : WIDTH;
        store<false>(exp(load<false>(x + i, left)), y + i, left);
    }
}

extern "C" {
void exp_f(const float* x, float* y, long n) {
    for (long i = 0; i < n; i++) y[i] = spikescale::exp_f(x[i]);
}
void exp_any(const float* x, float* y, long n) {
    each(x, y, n, [](vec v) { return spikescale::wkv::exp_any(v); });
}
void exp_moderate(const float* x, float* y, long n) {
    each(x, y, n, [](vec v) { return spikescale::wkv::exp_moderate(v); });
}
}
"""
# Where each promises 2 ulp: down to the smallest normal number, or as far as its comment says.
RANGES = {"exp_f": (-87.336, 88.0), "exp_any": (-87.336, 88.0), "exp_moderate": (-80.0, 80.0)}
STEP = 331  # of the bits of a float: every so manieth float is tried


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The functions, by name, for an instruction set."""
    source = tmp_path_factory.mktemp("exponential") / "exponential.cpp"
    source.write_text(SOURCE)

    @functools.cache
    def library(instruction_set):
        return build.load(source, instruction_set)

    def call(instruction_set, name, x):
        y = torch.empty_like(x)
        sizes = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(x.numel())
        getattr(library(instruction_set), name)(*sizes)
        return y

    return call


@functools.cache
def sweep(low, high):
    """Floats from `low` to `high`, their exact exponentials, and the distance of floats there."""

    def up_to(limit):
        # Below 2^-26 an exponential is 1, to half of its last bit.
        first, last = (torch.tensor(x).view(torch.int32).item() for x in (2.0**-26, limit))
        bits = torch.arange(first, last + 1, STEP, dtype=torch.int32)
        return torch.cat([bits, torch.tensor([last], dtype=torch.int32)]).view(torch.float32)

    x = torch.cat([-up_to(-low), torch.tensor([-1e-30, 0.0, 1e-30]), up_to(high)])
    exact = x.double().exp()
    return x, exact, torch.exp2(torch.floor(torch.log2(exact)) - 23)


@pytest.mark.parametrize("instruction_set", build.instruction_sets())
@pytest.mark.parametrize("name", RANGES)
def test_the_vector_exponential_is_within_two_ulp(name, instruction_set, compiled):
    x, exact, ulp = sweep(*RANGES[name])
    assert x.numel() > 1_500_000
    error = (compiled(instruction_set, name, x).double() - exact).abs_().div_(ulp)
    worst = int(error.argmax())
    assert error[worst] <= 2.0, (float(x[worst]), float(error[worst]))


@pytest.mark.parametrize("instruction_set", build.instruction_sets())
@pytest.mark.parametrize("name", ["exp_f", "exp_any"])
def test_the_vector_exponential_is_honest_at_the_edges(name, instruction_set, compiled):
    edges = torch.tensor([0.0, -0.0, -1e38, -torch.inf, -88.0, 89.0, torch.inf, torch.nan])
    out = compiled(instruction_set, name, edges)
    assert out[:-1].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, math.inf, math.inf]
    assert out[-1].isnan()
