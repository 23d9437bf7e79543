"""The variant rwkv is RWKV-4: logits, gradients and states equal those of transformers' implementation."""

from typing import Any

import pytest
import torch
from interop_cases import random_model, tiny
from torch.nn import functional as F

from spikescale.cli.main import main
from spikescale.interop.naming import HF_RWKV
from spikescale.interop.rwkv_state import from_hf_state, to_hf_state
from spikescale.model import SpikeGPT
from spikescale.model.store import load_model_folder

transformers = pytest.importorskip("transformers")


@pytest.fixture
def both(tmp_path, saved) -> tuple[SpikeGPT, Any]:
    model, folder = saved(tiny("rwkv"))
    assert main(["export", str(folder), str(tmp_path / "hf"), "--format", "hf-rwkv"]) == 0
    theirs, report = transformers.RwkvForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model, theirs.eval()


def tokens(time: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (2, time), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_equal_those_of_transformers(both):
    ours, theirs = both
    expected = theirs(tokens(31)).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(tokens(31))[0], expected, rtol=1e-4, atol=1e-4)


def test_gradients_equal_those_of_transformers(both):
    ours, theirs = (model.train() for model in both)
    inputs, targets = tokens(16), tokens(16, seed=2)
    for logits in (ours(inputs)[0], theirs(inputs).logits):
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[HF_RWKV.theirs(name)].grad
        assert parameter.grad is not None and gradient is not None and gradient.norm() > 0, name
        error = (parameter.grad - gradient.reshape(parameter.shape)).norm() / gradient.norm()
        assert error < 1e-4, (name, error)


def comparable(state: list[torch.Tensor]) -> list[torch.Tensor]:
    """The state without the freedom that the exponent m leaves: shifts, a / b, and the logarithm of b e^m."""
    channel, time, a, b, m = state
    return [channel, time, a / b, b.log() + m]


@torch.no_grad()
def test_either_goes_on_from_the_others_state(both):
    ours, theirs = both
    first, second = tokens(11), tokens(6, seed=2)
    _, state = ours(first)
    expected = theirs(first, use_cache=True)
    for mine, other in zip(comparable(to_hf_state(state)), comparable(expected.state), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    continued, _ = ours(second, from_hf_state(expected.state))
    torch.testing.assert_close(continued, ours(second, state)[0], rtol=1e-4, atol=1e-4)
    logits = theirs(second, state=to_hf_state(state), use_cache=True).logits
    torch.testing.assert_close(logits, continued, rtol=1e-4, atol=1e-4)


def test_membranes_have_no_place_in_their_state():
    _, state = random_model(tiny("spikegpt"))(tokens(3))
    with pytest.raises(ValueError, match="RWKV-4 has no membranes"):
        to_hf_state(state)


@torch.no_grad()
def test_a_model_that_transformers_saved_is_imported(tmp_path):
    settings = {"vocab_size": 256, "hidden_size": 24, "num_hidden_layers": 8, "context_length": 64}
    config = transformers.RwkvConfig(**settings, rescale_every=3)
    theirs = transformers.RwkvForCausalLM(config)
    for parameter in theirs.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    theirs.save_pretrained(tmp_path / "hf")
    words = ["import", str(tmp_path / "hf"), "--tokenizer", "byte", "--output"]
    assert main([*words, str(tmp_path / "m")]) == 0
    loaded = load_model_folder(tmp_path / "m")
    assert loaded.config.variant == "rwkv" and loaded.config.context_length == 64
    # In evaluation transformers halves weights and stream, which its LayerNorms' epsilon notices a little.
    expected = theirs.eval()(tokens(20)).logits
    torch.testing.assert_close(loaded.model(tokens(20))[0], expected, rtol=1e-3, atol=1e-3)
    # Saved as it is now, it is rescaled; that can be undone, to the bit.
    theirs.save_pretrained(tmp_path / "rescaled")
    words[1] = str(tmp_path / "rescaled")
    assert main([*words, str(tmp_path / "n"), "--rescaled-every", "3"]) == 0
    undone = load_model_folder(tmp_path / "n").model
    assert all(torch.equal(a, b) for a, b in zip(undone.parameters(), loaded.model.parameters(), strict=True))


def test_another_epsilon_and_tied_embeddings_are_noticed(tmp_path, capsys):
    settings = {"vocab_size": 256, "hidden_size": 24, "num_hidden_layers": 2}
    for name, changes in (("epsilon", {"layer_norm_epsilon": 1e-6}), ("tied", {"tie_word_embeddings": True})):
        model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**settings, **changes))
        model.save_pretrained(tmp_path / name)
    words = ["--tokenizer", "byte", "--output", str(tmp_path / "m")]
    assert main(["import", str(tmp_path / "epsilon"), *words]) == 2
    assert "layer_norm_epsilon is 1e-06; spikescale has 1e-05 only" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "tied"), *words]) == 0
    assert "assumed head: tied to the embeddings" in capsys.readouterr().out
    loaded = load_model_folder(tmp_path / "m").model
    assert torch.equal(loaded.head.weight, loaded.embedding.weight)


def test_a_model_that_forgets_between_documents_says_that_others_do_not(tmp_path, saved, caplog):
    for forgets in (False, True):
        _, folder = saved(tiny("rwkv", layers=2 + forgets, reset_at_documents=forgets))
        for kind in ("hf-rwkv", "spikescale"):
            caplog.clear()
            output = tmp_path / f"{kind}-{forgets}"
            assert main(["export", str(folder), str(output), "--format", kind]) == 0
            said = "give each document a fresh state" in caplog.text
            assert said == (forgets and kind == "hf-rwkv")
