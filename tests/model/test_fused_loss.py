"""The fused loss equals the plain one, value and gradients, and never holds all logits."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
pytest.importorskip("fla")

from model_cases import make_model, make_tokens

from spikescale.config import RunConfig
from spikescale.errors import UserError
from spikescale.model import fused_loss, language_model_loss
from spikescale.model.fused_loss import chunk_tokens, fused_language_model_loss
from spikescale.training.engine import uses_fused_loss

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: run pytest without -m gpu"
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 tokens for a vocabulary of 37."""
    monkeypatch.setattr(fused_loss, "CHUNK_LOGITS", 8 * 37)
    monkeypatch.setattr(fused_loss, "MULTIPLE", 4)


def make_case(batch=2, length=9, width=16, vocabulary=37):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, length, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    return hidden, weight, torch.randint(0, vocabulary, (batch, length), generator=generator)


def evaluate(fused, hidden, weight, targets, regulariser, scale=1.0):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if fused:
        loss, entropy = fused_language_model_loss(hidden, weight, targets, regulariser)
    else:
        loss, entropy = language_model_loss(torch.nn.functional.linear(hidden, weight), targets, regulariser)
    (scale * loss).backward()
    return loss.detach(), entropy, hidden.grad, weight.grad


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("regulariser", [0.0, 1e-4, 0.3])
def test_loss_cross_entropy_and_gradients_equal_the_plain_ones(regulariser):
    actual = evaluate(True, *make_case(), regulariser, scale=0.5)
    expected = evaluate(False, *make_case(), regulariser, scale=0.5)
    assert not actual[1].requires_grad
    for ours, plain in zip(actual, expected, strict=True):
        assert ours.dtype == plain.dtype == torch.float32
        assert relative(ours, plain) <= 1e-6


def test_under_autocast_the_products_are_bfloat16_and_the_gradients_float32():
    case = make_case()
    exact = evaluate(False, *case, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        actual = evaluate(True, *case, 0.1)
    for ours, plain in zip(actual, exact, strict=True):
        assert ours.dtype == torch.float32
        # The interpreter truncates to bfloat16, which has 8 bits.
        assert 1e-5 < relative(ours, plain) <= 2e-2


def test_the_regulariser_alone_has_the_plain_gradient():
    # Where the cross-entropy's own gradient nearly vanishes, that of the regulariser is all there is.
    hidden = torch.eye(4)[None] * 40
    weight, targets = torch.eye(4), torch.arange(4)[None]
    actual = evaluate(True, hidden, weight, targets, 1e-2)
    assert float(actual[0]) == pytest.approx(0.5 * 1e-2 * 1600)
    torch.testing.assert_close(actual[2], torch.eye(4)[None] * (1e-2 / 4 * 40))
    torch.testing.assert_close(actual[3], torch.eye(4) * (1e-2 / 4 * 40 * 40))


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest tensor that an operator returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def test_the_logits_of_all_tokens_never_exist():
    hidden, weight, targets = make_case(length=18, width=4)
    with Largest() as plain:
        evaluate(False, hidden, weight, targets, 0.1)
    with Largest() as fused:
        evaluate(True, hidden, weight, targets, 0.1)
    assert plain.bytes == 36 * 37 * 4
    assert fused.bytes == 8 * 37 * 4


def test_without_gradients_the_values_are_the_same():
    hidden, weight, targets = make_case()
    with torch.no_grad():
        loss, entropy = fused_language_model_loss(hidden, weight.requires_grad_(), targets, 0.3)
    expected = evaluate(False, hidden, weight.detach(), targets, 0.3)
    assert not loss.requires_grad
    assert relative(loss, expected[0]) <= 1e-6
    assert relative(entropy, expected[1]) <= 1e-6


def test_chunks_are_equal_whole_tiles_that_hold_the_wanted_number_of_logits(monkeypatch):
    monkeypatch.undo()
    assert chunk_tokens(8192, 50277) == 1280  # 7 chunks, the last a little shorter
    assert chunk_tokens(8192, 256) == 8192
    assert chunk_tokens(100, 50277) == 128


def test_shapes_that_do_not_match_are_refused():
    hidden, weight, targets = make_case()
    with pytest.raises(ValueError, match="do not match"):
        fused_language_model_loss(hidden, weight, targets[:, 1:])
    with pytest.raises(ValueError, match="do not match"):
        fused_language_model_loss(hidden, weight[:, 1:], targets)


def test_a_missing_fla_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.modules.fused_cross_entropy.ops", None)
    with pytest.raises(UserError, match=r"needs flash-linear-attention.*pip install 'spikescale\[gpu\]'"):
        fused_language_model_loss(*make_case())


def test_a_model_given_targets_has_the_loss_and_gradients_of_its_logits():
    model, tokens = make_model(backend="cpu"), make_tokens(2, 12)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    losses, state = model(inputs, targets=targets, regulariser=1e-3)
    fused = torch.autograd.grad(losses[0], list(model.parameters()))
    logits, expected_state = model(inputs)
    expected = language_model_loss(logits, targets, 1e-3)
    assert torch.allclose(losses, torch.stack(expected), rtol=1e-6)
    for ours, wanted in zip(fused, torch.autograd.grad(expected[0], list(model.parameters())), strict=True):
        assert relative(ours, wanted) <= 1e-5
    assert torch.equal(state[1]["time_neuron"], expected_state[1]["time_neuron"])


def test_the_fused_loss_is_chosen_on_gpus_and_can_be_forced_and_forbidden():
    def run(choice, stage=1):
        return RunConfig(data={"path": Path("x")}, train={"fused_loss": choice}, zero={"stage": stage})

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert uses_fused_loss(run("auto"), gpu)
    assert not uses_fused_loss(run("auto"), cpu)
    assert not uses_fused_loss(run("auto", 3), gpu)
    assert not uses_fused_loss(run("off"), gpu)
    with pytest.raises(UserError, match="fused_loss = on: its kernels run on GPUs, not on cpu"):
        uses_fused_loss(run("on"), cpu)
    with pytest.raises(UserError, match=r"zero\.stage 3 shards the head"):
        uses_fused_loss(run("on", 3), gpu)
