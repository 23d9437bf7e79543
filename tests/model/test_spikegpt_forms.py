"""One function in three forms: whole sequence, chunks, token by token; and documents kept apart."""

import pytest
import torch
from model_cases import VARIANTS, WrittenOut, make_model, make_tokens, record_spikes

from spikescale.model import detach_state


def run_in_pieces(model, tokens, size):
    """Logits and every neuron's spikes, reading `size` tokens a call."""
    spikes, state, logits = record_spikes(model), None, []
    with torch.no_grad():
        for start in range(0, tokens.shape[1], size):
            piece, state = model(tokens[:, start : start + size], state)
            logits.append(piece)
    return torch.cat(logits, dim=1), {name: torch.cat(parts, dim=1) for name, parts in spikes.items()}, state


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_equals_the_formulas_written_out_in_float64(variant, backend):
    model = make_model(variant, width=16, backend=backend)
    tokens = make_tokens(2, 12)
    logits = model(tokens)[0].detach()
    expected = WrittenOut(model).logits(tokens)
    assert float((logits.double() - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_and_single_tokens_equal_the_whole(variant):
    model, tokens = make_model(variant), make_tokens()
    whole, spikes, end = run_in_pieces(model, tokens, 40)
    assert variant == "rwkv" or 0.01 < torch.stack([s.mean() for s in spikes.values()]).mean() < 0.99
    for size in (13, 1):
        logits, others, state = run_in_pieces(model, tokens, size)
        torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)
        for name, fired in spikes.items():
            assert torch.equal(others[name], fired), name
        assert [sorted(block) for block in state] == [sorted(block) for block in end]
        for block, wanted in zip(state, end, strict=True):
            for name, tensor in block.items():
                torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reset_equals_separate_documents(variant):
    model, tokens = make_model(variant), make_tokens()
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, 0] = True
    reset[:, 17] = True
    _, _, foreign = run_in_pieces(model, make_tokens(2, 9), 9)
    with torch.no_grad():
        packed, end = model(tokens, foreign, reset)
        first, _ = model(tokens[:, :17])
        second, end_second = model(tokens[:, 17:])
    torch.testing.assert_close(packed, torch.cat([first, second], dim=1), rtol=1e-5, atol=1e-5)
    for block, wanted in zip(end, end_second, strict=True):
        for name, tensor in block.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_changes_nothing_before_it(variant):
    model, tokens = make_model(variant), make_tokens()
    changed = tokens.clone()
    changed[:, 21] = (changed[:, 21] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.equal(before[:, 21], after[:, 21])


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_has_constant_size_and_starts_where_no_state_does(variant):
    model, tokens = make_model(variant), make_tokens()
    initial = model.initial_state(2)
    with torch.no_grad():
        logits, state = model(tokens)
        assert torch.equal(model(tokens, initial)[0], logits)
    for block, start in zip(state, initial, strict=True):
        assert {name: (x.shape, x.dtype) for name, x in block.items()} == {
            name: (x.shape, x.dtype) for name, x in start.items()
        }


def test_forward_leaves_the_state_it_was_given_alone():
    model, tokens = make_model(), make_tokens()
    _, state = model(tokens)
    state = detach_state(state)
    copies = [{name: x.clone() for name, x in block.items()} for block in state]
    model(tokens, state)
    for block, copy in zip(state, copies, strict=True):
        assert all(torch.equal(block[name], copy[name]) for name in copy)


def test_gradients_flow_through_the_state_until_it_is_detached():
    model, tokens = make_model(), make_tokens()
    _, state = model(tokens[:, :20])
    assert not any(x.requires_grad for block in detach_state(state) for x in block.values())
    through = torch.autograd.grad(
        model(tokens[:, 20:], state)[0].sum(), model.embedding.weight, retain_graph=True
    )[0]
    cut = torch.autograd.grad(model(tokens[:, 20:], detach_state(state))[0].sum(), model.embedding.weight)[0]
    only_before = sorted(set(tokens[:, :20].flatten().tolist()) - set(tokens[:, 20:].flatten().tolist()))
    assert through[only_before].norm() > 0
    assert cut[only_before].norm() == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("layers", "width", "length"), [(1, 1, 1), (1, 33, 1), (3, 1, 63), (1, 100, 5)])
def test_odd_shapes_run_forward_and_backward(variant, layers, width, length):
    model = make_model(variant, layers=layers, width=width)
    logits, _ = model(make_tokens(1, length))
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
