"""Generation in recurrent form: the parallel form's logits, constant state, nothing computed twice."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spikescale.config import ModelConfig
from spikescale.inference import SamplingSettings, complete, generate, stream_text
from spikescale.model import SpikeGPT

VARIANTS = ("rwkv", "heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven")
EOS = 0


def random_model(variant: str = "spikegpt", vocab_size: int = 40, seed: int = 0, **changes: Any) -> SpikeGPT:
    """A small model whose weights are all random: as initialised, many projections are zero."""
    config = ModelConfig(
        variant=variant,
        layers=2,
        width=32,
        vocab_size=vocab_size,
        binary_embedding=variant != "rwkv",
        **changes,
    )
    model = SpikeGPT(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class Recorder:
    """Keeps what goes through a model: lengths, logits and sizes of the state."""

    def __init__(self, model: SpikeGPT) -> None:
        self.lengths: list[int] = []
        self.logits: list[Tensor] = []
        self.state_sizes: list[int] = []
        self.handle = model.register_forward_hook(self)

    def __call__(
        self, model: SpikeGPT, inputs: tuple, output: tuple[Tensor, list[dict[str, Tensor]]]
    ) -> None:
        logits, state = output
        self.lengths.append(inputs[0].shape[1])
        self.logits.append(logits[:, -1])
        self.state_sizes.append(sum(t.numel() * t.element_size() for layer in state for t in layer.values()))


def some_prompts(batch: int, length: int, vocab_size: int = 40) -> Tensor:
    return torch.randint(1, vocab_size, (batch, length), generator=torch.Generator().manual_seed(5))


def produced(model: SpikeGPT, prompts: Tensor, prompt_chunk: int = 256, **settings: Any) -> Tensor:
    chosen = SamplingSettings(**{"stop_at_eos": False, "max_tokens": 20, **settings})
    steps = list(generate(model, prompts, eos_id=EOS, settings=chosen, prompt_chunk=prompt_chunk))
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt_chunk", [256, 7])
def test_streaming_logits_equal_the_parallel_forms(variant, prompt_chunk):
    model, prompts = random_model(variant), some_prompts(3, 17)
    recorder = Recorder(model)
    tokens = produced(model, prompts, prompt_chunk)
    recorder.handle.remove()
    with torch.no_grad():
        logits, _ = model(torch.cat([prompts, tokens], dim=1))
    streamed = torch.stack(recorder.logits[-20:], dim=1)
    assert streamed.std() > 0.1
    assert (streamed - logits[:, 16:36]).abs().max() <= 1e-5


def test_each_new_token_is_one_pass_of_length_one_and_nothing_is_read_twice():
    model = random_model()
    recorder = Recorder(model)
    produced(model, some_prompts(2, 10), prompt_chunk=4, max_tokens=15)
    assert recorder.lengths == [4, 4, 2] + [1] * 14


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_does_not_grow(variant):
    model = random_model(variant)
    recorder = Recorder(model)
    produced(model, some_prompts(2, 50), max_tokens=60)
    assert len(set(recorder.state_sizes)) == 1
    assert recorder.state_sizes[0] > 0


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    model, prompts = random_model(), some_prompts(2, 5)
    first = produced(model, prompts, seed=1)
    torch.manual_seed(99)  # the global generator must play no part
    assert torch.equal(first, produced(model, prompts, seed=1))
    assert not torch.equal(first, produced(model, prompts, seed=2))


def test_samples_of_one_prompt_differ_from_one_another():
    tokens = produced(random_model(), some_prompts(1, 5).expand(4, -1))
    assert len({tuple(row.tolist()) for row in tokens}) == 4


def test_greedy_tokens_are_the_arg_max_of_the_parallel_form():
    model, prompts = random_model(), some_prompts(2, 6)
    tokens = produced(model, prompts, temperature=0)
    with torch.no_grad():
        logits, _ = model(torch.cat([prompts, tokens], dim=1))
    assert torch.equal(tokens, logits[:, 5:25].argmax(-1))


def test_a_strong_penalty_never_repeats_a_token():
    model, prompts = random_model(), some_prompts(2, 5)
    tokens = produced(model, prompts, repetition_penalty=1e9, temperature=0, max_tokens=12)
    for row, prompt in zip(tokens.tolist(), prompts.tolist(), strict=True):
        # Positive logits vanish and negative ones sink: a seen token could only win if nothing else is left.
        assert len(set(row)) == 12
        assert not set(row) & set(prompt)


def test_an_empty_prompt_is_continued_as_after_the_end_of_a_document():
    model = random_model()
    empty = produced(model, torch.empty(2, 0, dtype=torch.long))
    assert torch.equal(empty, produced(model, torch.full((2, 1), EOS)))


def test_a_sample_that_has_ended_stays_ended_and_the_last_one_stops_the_iteration():
    model, prompts = random_model(vocab_size=4), some_prompts(8, 3, 4)
    tokens = produced(model, prompts, stop_at_eos=True, max_tokens=500)
    assert tokens.shape[1] < 500
    for row in tokens.tolist():
        assert set(row[row.index(EOS) :]) == {EOS}
    assert all(EOS not in row[:-1] for row in tokens.tolist() if row.index(EOS) == len(row) - 1)


def test_no_tokens_asked_for_are_no_tokens():
    steps = generate(random_model(), some_prompts(1, 3), eos_id=EOS, settings=SamplingSettings(max_tokens=0))
    assert list(steps) == []


def test_dropout_is_off_while_generating_and_training_goes_on_afterwards():
    model = random_model(dropout=0.5)
    expected = produced(model, some_prompts(1, 4), temperature=0)
    assert torch.equal(produced(model.train(), some_prompts(1, 4), temperature=0), expected)
    assert model.training


class Letters:
    """Ids 1-26 are letters, 27 and 28 the two bytes of one e with an accent, 0 ends a document."""

    vocab_size, eos_id = 29, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def stream_decoder(self) -> "LettersDecoder":
        return LettersDecoder()


class LettersDecoder:
    def __init__(self) -> None:
        self.bytes = b""

    def push(self, token: int) -> str:
        self.bytes += {27: b"\xc3", 28: b"\xa9"}.get(token) or bytes((96 + token,))
        if self.bytes.endswith(b"\xc3"):
            return ""
        text, self.bytes = self.bytes.decode(errors="replace"), b""
        return text

    def finish(self) -> str:
        text, self.bytes = self.bytes.decode(errors="replace"), b""
        return text


class Scripted(torch.nn.Module):
    """Predicts, with certainty, the next token of a script for each row."""

    def __init__(self, *scripts: list[int]) -> None:
        super().__init__()
        self.scripts = torch.nn.Parameter(torch.tensor(scripts, dtype=torch.float32))

    def forward(self, tokens: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        position = state[0]["position"] if state else -1
        column = self.scripts[:, position + 1].long()
        logits = torch.nn.functional.one_hot(column, 29).float()[:, None] * 1000
        return logits.expand(-1, tokens.shape[1], -1), [{"position": position + 1}]


def test_text_comes_character_by_character_and_stops_at_the_end_of_the_document():
    model = Scripted([8, 27, 28, 9, 0, 5, 5], [1, 2, 3, 27, 4, 0, 5])
    pieces = list(stream_text(model, Letters(), "abc", samples=2, settings=SamplingSettings(temperature=0)))
    assert [row[0] for row in pieces] == ["h", "", "é", "i", "", "", ""]
    assert "".join(row[1] for row in pieces[:3]) == "abc"
    assert complete(model, Letters(), "", samples=2)[0] == "héi"


def test_an_unfinished_character_is_shown_when_the_text_ends():
    model = Scripted([8, 27])
    assert complete(model, Letters(), "a", settings=SamplingSettings(max_tokens=2)) == ["h\ufffd"]


def test_documents_that_follow_one_another_are_separated_by_an_empty_line():
    settings = SamplingSettings(max_tokens=5, stop_at_eos=False)
    assert complete(Scripted([1, 2, 0, 3, 4]), Letters(), "z", settings=settings) == ["ab\n\ncd"]
