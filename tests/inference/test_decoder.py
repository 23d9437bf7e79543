"""The decoder and the model take each other's state, and generation is the same with either."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spikescale.cli.main import main
from spikescale.config import ModelConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.errors import UserError
from spikescale.inference import SamplingSettings, generate, stream_text
from spikescale.inference.decoder import Decoder
from spikescale.inference.generate import _announce, choose_decoder
from spikescale.model import SpikeGPT
from spikescale.model.store import save_model_folder

VARIANTS = ("rwkv", "heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven")


def random_model(variant: str = "spikegpt", vocab_size: int = 60, **changes: Any) -> SpikeGPT:
    settings = {"layers": 2, "width": 32, "binary_embedding": variant != "rwkv", **changes}
    model = SpikeGPT(ModelConfig(variant=variant, vocab_size=vocab_size, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 3 / parameter.shape[-1] ** 0.5
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def some_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 60, (batch, length), generator=torch.Generator().manual_seed(5))


def steps(decoder: Decoder, tokens: Tensor) -> Tensor:
    return torch.stack([decoder.step(tokens[:, t]) for t in range(tokens.shape[1])], dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_state_goes_from_the_model_to_the_decoder_and_back(variant):
    model, tokens = random_model(variant), some_tokens(3, 40)
    whole, final = model(tokens)
    _, state = model(tokens[:, :15])
    kept = [{key: x.clone() for key, x in block.items()} for block in state]
    decoder = Decoder(model)
    decoder.load_state(state)
    decoded = steps(decoder, tokens[:, 15:28])
    rest, end = model(tokens[:, 28:], decoder.state())
    assert whole.std() > 0.1
    assert (decoded - whole[:, 15:28]).norm() <= 1e-5 * whole[:, 15:28].norm()
    assert (rest - whole[:, 28:]).norm() <= 1e-5 * whole[:, 28:].norm()
    for block, ours, theirs, before in zip(state, end, final, kept, strict=True):
        assert all(torch.equal(block[key], before[key]) for key in block)
        for key in theirs.keys() - {"time_mix.wkv"}:
            assert torch.allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-5)


def test_decoding_resumes_from_its_own_state_bit_by_bit():
    model, tokens = random_model(), some_tokens(2, 20)
    decoder, other = Decoder(model), Decoder(model)
    steps(decoder, tokens[:, :8])
    state = decoder.state()
    expected = steps(decoder, tokens[:, 8:])
    other.load_state(state)
    # The exponent of WKV's sums is rounded once in a state.
    assert (steps(other, tokens[:, 8:]) - expected).norm() <= 1e-6 * expected.norm()
    again = Decoder(model)
    again.load_state(state)
    other.load_state(state)
    assert torch.equal(steps(again, tokens[:, 8:]), steps(other, tokens[:, 8:]))


def test_a_state_of_another_batch_can_be_loaded_at_any_time():
    model = random_model()
    decoder = Decoder(model)
    steps(decoder, some_tokens(2, 4))
    decoder.load_state(model.initial_state(5))
    fresh = Decoder(model)
    assert torch.equal(steps(decoder, some_tokens(5, 4)), steps(fresh, some_tokens(5, 4)))


def test_there_is_no_state_before_the_first_token():
    with pytest.raises(ValueError, match="there is no state yet"):
        Decoder(random_model()).state()


def test_the_reference_backend_is_the_model_itself():
    model, tokens = random_model(backend="reference"), some_tokens(2, 6)
    decoder = Decoder(model, backend="reference")
    with torch.no_grad():
        assert torch.allclose(steps(decoder, tokens), model(tokens)[0], atol=1e-6)
    assert decoder.state()[0].keys() == model.initial_state(1)[0].keys()
    with pytest.raises(UserError, match="only the C\\+\\+ backends have them"):
        Decoder(model, "bfloat16", "reference")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_are_the_same_with_either_engine(variant, batch):
    model, prompts = random_model(variant), some_tokens(batch, 9)
    settings = SamplingSettings(temperature=0, max_tokens=25, stop_at_eos=False)
    native, torch_ = (
        torch.stack(list(generate(model, prompts, eos_id=0, settings=settings, engine=engine)))
        for engine in ("native", "torch")
    )
    assert torch.equal(native, torch_)
    assert len(native.unique()) > 3


def test_the_seed_draws_the_same_text_with_either_engine():
    model, tokenizer = random_model(vocab_size=256), make_tokenizer("byte")
    settings = SamplingSettings(max_tokens=20, top_p=0.9, seed=4, stop_at_eos=False)
    native, torch_ = (
        list(stream_text(model, tokenizer, "abc", samples=2, settings=settings, engine=engine))
        for engine in ("native", "torch")
    )
    assert native == torch_


def test_a_whole_float32_model_on_the_cpu_is_decoded_natively_and_others_are_not():
    model = random_model()
    assert isinstance(choose_decoder(model, "auto", "float32"), Decoder)
    assert choose_decoder(model, "torch", "float32") is None
    assert choose_decoder(random_model(backend="reference"), "auto", "float32") is None
    assert choose_decoder(random_model().double(), "auto", "float32") is None
    model.neurons()[0][1].monitor = True
    assert choose_decoder(model, "auto", "float32") is None
    assert isinstance(choose_decoder(model, "native", "float32"), Decoder)


def test_a_hook_on_the_model_sees_every_token():
    model = random_model()
    lengths = []
    model.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    list(
        generate(
            model, some_tokens(1, 4), eos_id=0, settings=SamplingSettings(max_tokens=5, stop_at_eos=False)
        )
    )
    assert lengths == [4, 1, 1, 1, 1]


def test_falling_back_is_said_once(caplog):
    _announce.cache_clear()
    model = random_model().bfloat16()
    with caplog.at_level(logging.INFO, "spikescale.inference"):
        for _ in range(3):
            assert choose_decoder(model, "auto", "float32") is None
    assert [r.getMessage() for r in caplog.records] == [
        "generation: torch runs the steps (its weights are bfloat16, not float32)"
    ]


@pytest.mark.parametrize(
    ("change", "engine", "weights", "complaint"),
    [
        ({}, "fast", "float32", "engine 'fast': must be one of auto, native, torch"),
        ({}, "auto", "int3", "weights 'int3': must be one of float32, bfloat16"),
        ({}, "torch", "bfloat16", "weights bfloat16: only the native engine has them"),
        ({"backend": "reference"}, "native", "float32", "engine native: the operators' backend is reference"),
    ],
)
def test_what_cannot_be_had_is_refused(change, engine, weights, complaint):
    with pytest.raises(UserError, match=complaint):
        generate(
            random_model(**change),
            some_tokens(1, 2),
            eos_id=0,
            settings=SamplingSettings(),
            engine=engine,
            weights=weights,
        )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(vocab_size=256)
    folder = tmp_path_factory.mktemp("models") / "random"
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_model_folder(folder, weights, model.config, make_tokenizer("byte"), {})
    return folder


def test_the_command_line_chooses_engine_and_weights(model_folder, capsys):
    texts = []
    for words in (["--engine", "native"], ["--engine", "torch"], ["--weights", "bfloat16"]):
        assert main(["generate", str(model_folder), "--temperature", "0", "--tokens", "12", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--engine", "torch", "--weights", "bfloat16"], "weights bfloat16: only the native engine has them"),
        (
            ["--engine", "native", "--backend", "reference"],
            "engine native: the operators' backend is reference",
        ),
    ],
)
def test_the_command_line_refuses_what_cannot_be_had_in_one_line(model_folder, words, complaint, capsys):
    assert main(["generate", str(model_folder), "--prompt", "x", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {complaint}")
    assert captured.err.count("\n") == 1
