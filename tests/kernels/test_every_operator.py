"""What holds for all operators: Triton launches go to the tensors' GPU, and tensors may be empty."""

import contextlib
import os

import pytest
import torch
from operator_cases import DIFFERENTIABLE, make_case

from spikescale.kernels import gpu
from spikescale.kernels.build import instruction_sets

# Lanes without a channel compute with infinities that are never stored; fla says that there is no GPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Triton is not supported"),
]
CPU = [f"cpu-{name}" for name in instruction_sets()]
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
)


def test_the_context_of_a_launch_is_the_gpu_of_the_tensor(monkeypatch):
    entered = []

    class OnSecondGpu:
        is_cuda, device = True, torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device))
    gpu.on_device(OnSecondGpu())
    assert entered == [torch.device("cuda", 1)]
    with gpu.on_device(torch.zeros(1)):
        assert entered == [torch.device("cuda", 1)]


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "spike_bits"])
def test_every_launch_is_made_inside_that_context(name, backend, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    from spikescale.kernels.lif_norm import triton as lif_norm

    entered, launched, launch = [], [], GridExecutor.__call__

    @contextlib.contextmanager
    def on_device(x):
        entered.append(x.shape)
        yield
        entered.pop()

    def watched(executor, *args, **kwargs):
        launched.append((executor.fn.__name__, len(entered)))
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(gpu, "on_device", on_device)
    monkeypatch.setattr(GridExecutor, "__call__", watched)
    if name.endswith("in parts"):
        monkeypatch.setattr(lif_norm, "MAX_CHANNELS", 2)
    run, leaves = make_case(name, 1, 3, 4)
    outputs = run(backend)
    if name != "spike_bits":
        torch.autograd.grad([out.sum() for out in outputs], list(leaves.values()), allow_unused=True)
    assert len(launched) >= 2
    assert all(depth == 1 for _, depth in launched), launched


@pytest.mark.parametrize("backend", ["reference", *CPU, TRITON])
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "spike_bits"])
def test_an_empty_batch_gives_empty_outputs_and_gradients_of_zero(name, backend):
    run, leaves = make_case(name, 0, 5, 3)
    outputs = run(backend)
    assert all(out.shape[0] == 0 for out in outputs)
    if name == "spike_bits":
        return
    names = list(leaves)
    grads = torch.autograd.grad([out.sum() for out in outputs], list(leaves.values()), allow_unused=True)
    found = {leaf: grad for leaf, grad in zip(names, grads, strict=True) if grad is not None}
    assert "x" in found
    for leaf, grad in found.items():
        assert grad.shape == leaves[leaf].shape
        assert not grad.any(), leaf
    parameters = {"squared_relu": 0, "sigmoid_gate": 0}.get(name, 2)
    assert len(found.keys() & {"first", "second", "third", "fourth"}) == parameters


@pytest.mark.parametrize("backend", ["reference", *CPU])
@pytest.mark.parametrize("name", ["wkv", "lif", "token_mix", "squared_relu", "sigmoid_gate"])
def test_no_channels_are_no_error(name, backend):
    run, leaves = make_case(name, 2, 5, 0)
    outputs = run(backend)
    assert outputs[0].shape == (2, 5, 0)
    (grad,) = torch.autograd.grad([out.sum() for out in outputs], [leaves["x"]])
    assert grad.shape == (2, 5, 0)


@pytest.mark.parametrize("backend", ["reference", *CPU, TRITON])
@pytest.mark.parametrize("name", ["squared_relu", "sigmoid_gate", "layer_norm", "spike_bits"])
def test_no_tokens_are_no_error_where_the_reference_takes_them(name, backend):
    run, leaves = make_case(name, 2, 0, 3)
    outputs = run(backend)
    assert outputs[0].shape == (2, 0, 3)
    if name != "spike_bits":
        (grad,) = torch.autograd.grad(outputs[0].sum(), [leaves["x"]])
        assert grad.shape == (2, 0, 3)


@pytest.mark.parametrize("backend", ["reference", *CPU, TRITON])
@pytest.mark.parametrize("name", ["wkv", "lif", "lif_norm", "token_mix"])
def test_recurrent_operators_refuse_to_read_no_tokens(name, backend):
    run, _ = make_case(name, 2, 0, 3)
    with pytest.raises(ValueError, match="time >= 1"):
        run(backend)
