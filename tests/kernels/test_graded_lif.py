"""Graded spikes: what they are in formulas, and that the composed form has their bits and gradients."""

import pytest
import torch

from spikescale.errors import UserError
from spikescale.kernels.build import BuildError, instruction_sets
from spikescale.kernels.lif import graded_lif, lif
from spikescale.kernels.lif.graded import _say_slow
from spikescale.kernels.lif.graded_cpu import library

KINDS = [(1, False), (3, False), (1, True), (3, True), (7, True)]
MODES = [(False, False), (True, False), (False, True), (True, True)]  # soft_reset, detach_reset


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(2, 30, 7, generator=generator, dtype=dtype)
    v = torch.randn(2, 7, generator=generator, dtype=dtype)
    reset = torch.rand(2, 30, generator=generator) < 0.1
    tau = 1.2 + torch.rand(7, generator=generator, dtype=dtype)
    threshold = 0.3 + 0.5 * torch.rand(7, generator=generator, dtype=dtype)
    return [t.requires_grad_() for t in (x, v, tau, threshold)], reset


def spikes_by_hand(x, v, tau, threshold, levels, signed, soft, v_reset):
    """One neuron in Python's numbers."""
    out = []
    for current in x:
        h = v + (current - (v - v_reset)) / tau
        size = sum((h > k * threshold) if soft else (h >= k * threshold) for k in range(1, levels + 1))
        if signed:
            size -= sum((-h > k * threshold) if soft else (-h >= k * threshold) for k in range(1, levels + 1))
        out.append(size)
        v = h - size * threshold if soft else (v_reset if size else h)
    return out, v


@pytest.mark.parametrize(("levels", "signed"), KINDS)
@pytest.mark.parametrize("soft", [False, True])
def test_spikes_and_membranes_are_those_of_the_formula(levels, signed, soft):
    (x, v, tau, threshold), _ = case()
    spikes, end = graded_lif(
        x, v, levels=levels, signed=signed, tau=tau, v_threshold=threshold, v_reset=-0.1, soft_reset=soft
    )
    for row in range(2):
        for c in range(7):
            numbers = (v[row, c].item(), tau[c].item(), threshold[c].item())
            wanted, last = spikes_by_hand(x[row, :, c].tolist(), *numbers, levels, signed, soft, -0.1)
            assert spikes[row, :, c].tolist() == wanted
            assert float(end[row, c]) == pytest.approx(last, abs=1e-12)
    assert spikes.max() == levels
    assert spikes.min() == (-levels if signed else 0)


@pytest.mark.parametrize(("levels", "signed"), KINDS)
@pytest.mark.parametrize(("soft", "detach"), MODES)
def test_composed_gradients_are_those_of_the_definition(levels, signed, soft, detach):
    results = []
    for backend in ("reference", "auto"):
        leaves, reset = case()
        x, v, tau, threshold = leaves
        options = {"soft_reset": soft, "detach_reset": detach, "v_reset": 0.2, "surrogate_alpha": 3.0}
        spikes, end = graded_lif(
            x,
            v,
            levels=levels,
            signed=signed,
            tau=tau,
            v_threshold=threshold,
            reset=reset,
            backend=backend,
            **options,
        )
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(spikes.shape, generator=generator, dtype=spikes.dtype)
        (spikes * weights).sum().add((end * weights[:, 0]).sum()).backward()
        results.append([spikes, end, *(leaf.grad for leaf in leaves)])
    names = ("spikes", "end", "x", "v", "tau", "threshold")
    for name, wanted, actual in zip(names, *results, strict=True):
        assert wanted.abs().sum() > 0, name
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("levels", "signed"), [*KINDS, (15, False), (255, True)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(2, 30, 7), (1, 1, 1), (3, 63, 33), (1, 100, 100)])
@pytest.mark.parametrize("detach", [False, True])
def test_compiled_neurons_fire_bit_for_bit_like_the_definition(levels, signed, soft, shape, detach):
    results = []
    for backend in ("reference", "cpu"):
        generator = torch.Generator().manual_seed(4)
        x = (2 * torch.randn(*shape, generator=generator)).transpose(0, 1).contiguous().transpose(0, 1)
        x, v = x.requires_grad_(), torch.randn(shape[0], shape[2], generator=generator).requires_grad_()
        reset = torch.rand(shape[:2], generator=generator) < 0.1
        tau = (1.1 + torch.rand(shape[2], generator=generator)).requires_grad_()
        threshold = (0.2 + torch.rand(shape[2], generator=generator)).requires_grad_()
        options = {"tau": tau, "v_threshold": threshold, "v_reset": -0.1, "soft_reset": soft, "reset": reset}
        options["detach_reset"] = detach
        spikes, end = graded_lif(x, v, levels=levels, signed=signed, backend=backend, **options)
        weights = torch.randn(shape, generator=generator)
        (spikes * weights).sum().add((end * weights[:, 0]).sum()).backward()
        results.append([spikes.detach(), end.detach(), x.grad, v.grad, tau.grad, threshold.grad])
    for wanted, actual in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(actual, wanted)
    for wanted, actual in zip(results[0][2:], results[1][2:], strict=True):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm().clamp_min(1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_one_level_without_a_sign_is_the_ordinary_neuron(soft):
    (x, v, _, _), reset = case(torch.float32)
    found = []
    for neuron in (
        lambda *a, **k: graded_lif(*a, levels=1, **k),
        lambda *a, **k: lif(*a, backend="cpu", **k),
    ):
        leaf = x.detach().clone().requires_grad_()
        spikes, end = neuron(leaf, v.detach(), tau=2.0, v_threshold=0.6, soft_reset=soft, reset=reset)
        (spikes.square().sum() + end.sum()).backward()
        found.append((spikes.detach(), end.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-6)


def test_a_membrane_that_is_no_number_gives_a_spike_that_is_none():
    x = torch.ones(1, 3, 1)
    x[0, 1] = torch.nan
    spikes, _ = graded_lif(x, levels=3, v_threshold=0.25)
    assert spikes[0, 0] == 2
    assert spikes[0, 1].isnan()


def test_fewer_levels_than_one_are_refused():
    with pytest.raises(ValueError, match="levels >= 1"):
        graded_lif(torch.ones(1, 1, 1), levels=0)


def test_where_no_kernel_serves_it_is_said_once(caplog):
    _say_slow.cache_clear()
    for _ in range(2):
        graded_lif(torch.ones(1, 2, 3, dtype=torch.float64), levels=3)
    (record,) = caplog.records
    assert "float64 tensors on cpu" in record.getMessage()


@pytest.mark.parametrize("backend", ["cpu", "cpu-plain", "triton"])
def test_a_named_backend_is_used_or_refused(backend):
    with pytest.raises(UserError, match=rf"backend '{backend}' of lif: .*, not float64"):
        graded_lif(torch.ones(1, 2, 3, dtype=torch.float64), levels=3, backend=backend)
    if backend != "triton":
        library.cache_clear()
        graded_lif(torch.ones(1, 2, 3), levels=3, backend=backend)
        library(f"cpu-{instruction_sets()[0]}" if backend == "cpu" else backend)
        assert library.cache_info().currsize == 1  # that one has run, and no other


def test_cpp_that_cannot_be_built_is_replaced_where_none_is_named(caplog, monkeypatch):
    def broken(backend):
        raise BuildError("graded.cpp: no compiler")

    monkeypatch.setattr("spikescale.kernels.lif.graded_cpu.library", broken)
    _say_slow.cache_clear()
    x = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    spikes, _ = graded_lif(x, levels=3)
    assert torch.equal(spikes, graded_lif(x, levels=3, backend="reference")[0])
    assert "slow loop" in caplog.text
    with pytest.raises(BuildError, match="no compiler"):
        graded_lif(x, levels=3, backend="cpu")
