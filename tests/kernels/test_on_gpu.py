"""Every operator on a GPU against its reference, forward and every gradient. Run with `pytest -m gpu`."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import DIFFERENTIABLE, make_case
from torch import Tensor

from spikescale.kernels.activations import sigmoid_gate, squared_relu
from spikescale.kernels.layer_norm import layer_norm
from spikescale.kernels.lif import graded_lif, lif
from spikescale.kernels.lif_norm import lif_residual_norm
from spikescale.kernels.spike_bits import pack_spikes, pack_sure_spikes, unpack_spikes
from spikescale.kernels.token_mix import token_mix
from spikescale.kernels.wkv import initial_state, wkv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets: run `pytest -m gpu`"
    ),
]
DEVICE = "cuda"
OPERATORS = ("wkv", "lif", "graded_lif", "lif_norm", "token_mix", "activations", "layer_norm")
SHAPES = [(1, 1, 1), (2, 63, 33), (1, 200, 100), (2, 1000, 500), (8, 1024, 768)]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# What the model's dtype applies to; the rest is float32.
NARROW = {"x", "y", "k", "v", "gate", "current"}


def make_inputs(operator: str, batch: int, length: int, channels: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + length + channels)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    shape, vector, row = (batch, length, channels), (channels,), (batch, channels)
    if operator == "wkv":
        state = initial_state(batch, channels)
        state[:, 0], state[:, 1], state[:, 2] = normal(*row), 1 + normal(*row).abs(), 0
        inputs = {"w": -normal(*vector).exp(), "u": normal(*vector), "k": normal(*shape, scale=3)}
        return {**inputs, "v": normal(*shape), "state": state, "gate": normal(*shape)}
    if operator in ("lif", "graded_lif"):
        return {"x": normal(*shape, scale=2), "membrane": normal(*row)}
    if operator == "lif_norm":
        inputs = {"stream": normal(*shape), "current": normal(*shape, scale=2), "membrane": normal(*row)}
        return {**inputs, "weight": 1 + normal(*vector, scale=0.1), "bias": normal(*vector)}
    if operator == "layer_norm":
        return {"x": normal(*shape), "k": 1 + normal(*vector, scale=0.1), "v": normal(*vector)}
    if operator == "token_mix":
        mus = {f"mu{n}": torch.rand(channels, generator=generator) for n in range(3)}
        return {"x": normal(*shape), "last": normal(*row), **mus}
    return {"x": normal(*shape, scale=3), "y": normal(*shape)}


def call(operator: str, t: dict[str, Tensor], reset: Tensor, backend: str) -> list[Tensor]:
    if operator == "wkv":
        y, state = wkv(t["w"], t["u"], t["k"], t["v"], t["state"], reset, t["gate"], backend=backend)
        # The mean of the past: the sums themselves have a scale of the implementation's choice.
        return [y, state[:, 0] / state[:, 1]]
    if operator == "lif":
        return list(lif(t["x"], t["membrane"], reset=reset, backend=backend))
    if operator == "graded_lif":
        options = {"levels": 3, "signed": True, "v_threshold": 0.5, "reset": reset, "backend": backend}
        return list(graded_lif(t["x"], t["membrane"], **options))
    if operator == "lif_norm":
        arguments = (t["stream"], t["current"], t["membrane"], t["weight"], t["bias"])
        x, normed, v = lif_residual_norm(*arguments, dropout=0.1, seed=7, reset=reset, backend=backend)
        assert normed is not None
        return [x, normed, v]
    if operator == "layer_norm":
        return [layer_norm(t["x"], t["k"], t["v"], backend=backend)]
    if operator == "token_mix":
        return token_mix(t["x"], [t["mu0"], t["mu1"], t["mu2"]], t["last"], reset, backend=backend)
    return [squared_relu(t["x"], backend=backend), sigmoid_gate(t["x"], t["y"], backend=backend)]


def evaluate(
    function: Callable[[dict[str, Tensor], Tensor], list[Tensor]],
    inputs: dict[str, Tensor],
    reset: Tensor,
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> dict[str, Tensor]:
    """Outputs and gradients by name, of a fixed random combination; `dtypes`: of NARROW, and of the rest."""
    leaves = {
        name: x.to(device, dtypes[0] if name in NARROW else dtypes[1]).detach().requires_grad_()
        for name, x in inputs.items()
    }
    outputs = function(leaves, reset.to(device))
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(out.shape, generator=generator).bfloat16().to(device, out.dtype) for out in outputs
    ]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {**{f"output {n}": out for n, out in enumerate(outputs)}, **dict(zip(leaves, grads, strict=True))}
    return {name: x.detach().double().cpu() for name, x in named.items()}


def errors_of(
    operator: str, shape: tuple[int, int, int], dtype: torch.dtype, function: Any = None
) -> dict[str, float]:
    """||actual - reference|| / ||reference|| by name."""
    inputs = make_inputs(operator, *shape)
    inputs = {name: x.to(dtype).float() if name in NARROW else x for name, x in inputs.items()}
    reset = torch.rand(shape[:2], generator=torch.Generator().manual_seed(2)) < 0.05
    function = function or (lambda t, reset: call(operator, t, reset, "triton"))
    actual = evaluate(function, inputs, reset, DEVICE, (dtype, torch.float32))
    # A neuron near its threshold fires or not by the last bit: its reference has the same dtype.
    exact = (dtype, torch.float32) if "lif" in operator else (torch.float64, torch.float64)
    expected = evaluate(lambda t, reset: call(operator, t, reset, "reference"), inputs, reset, DEVICE, exact)
    return {name: float((actual[name] - x).norm() / x.norm().clamp_min(1.0)) for name, x in expected.items()}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_outputs_and_gradients_equal_the_reference(operator, shape, dtype):
    errors = errors_of(operator, shape, dtype)
    assert max(errors.values()) <= LIMITS[dtype], errors


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_both_forms_of_wkv_equal_the_reference(shape):
    from spikescale.kernels.wkv.triton import wkv_triton

    for form in ("chunked", "sequential"):

        def run(t: dict[str, Tensor], reset: Tensor, form: str = form) -> list[Tensor]:
            y, state = wkv_triton(t["w"], t["u"], t["k"], t["v"], t["state"], reset, t["gate"], form)
            return [y, state[:, 0] / state[:, 1]]

        errors = errors_of("wkv", shape, torch.float32, run)
        assert max(errors.values()) <= 1e-5, (form, errors)


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("drive", ["random", "constant above the threshold"])
def test_both_forms_of_lif_give_the_same_spikes_bit_for_bit(shape, drive):
    from spikescale.kernels.lif.triton import lif_triton

    x = make_inputs("lif", *shape)["x"].to(DEVICE)
    if drive != "random":
        x = torch.full_like(x, 1.3) + 1e-3 * x
    v = torch.zeros(shape[0], shape[2], device=DEVICE)
    neuron = (2.0, 1.0, 0.0, False, False, 2.0)
    parallel, v_parallel = lif_triton(x, v, None, *neuron, form="parallel")
    sequential, v_sequential = lif_triton(x, v, None, *neuron, form="sequential")
    assert torch.equal(parallel, sequential)
    assert torch.equal(v_parallel, v_sequential)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "spike_bits"])
def test_tensors_on_a_second_gpu_are_computed_there(name):
    results = []
    for device in ("cuda:0", "cuda:1"):
        run, leaves = make_case(name, 2, 40, 33, device)
        outputs = run("triton")
        if name != "spike_bits":
            wanted = [out.sum() for out in outputs]
            outputs += torch.autograd.grad(wanted, list(leaves.values()), allow_unused=True)
        assert torch.cuda.current_device() == 0
        results.append([out for out in outputs if out is not None])
    for first, second in zip(*results, strict=True):
        assert second.device == torch.device("cuda:1")
        assert torch.equal(first, second.to(first.device))


@pytest.mark.parametrize("dtype", LIMITS)
def test_sure_spikes_come_back_without_waiting_for_the_gpu(dtype):
    spikes = (torch.rand(3, 9001) < 0.3).to(DEVICE, dtype)
    with torch.cuda.device(DEVICE):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            bits = pack_sure_spikes(spikes)
            back = unpack_spikes(bits, spikes.shape, dtype)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(back, spikes)
    assert torch.equal(pack_spikes(spikes), bits[: -(-spikes.numel() // 8)])
    assert pack_spikes(spikes * 0.5) is None


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_second_run_gives_the_same_bits(operator):
    inputs = make_inputs(operator, 2, 1000, 500)
    reset = torch.zeros(2, 1000, dtype=torch.bool)

    def run() -> dict[str, Tensor]:
        dtypes = (torch.bfloat16, torch.float32)
        return evaluate(lambda t, reset: call(operator, t, reset, "triton"), inputs, reset, DEVICE, dtypes)

    first, second = run(), run()
    for name in first:
        assert torch.equal(first[name], second[name]), name
