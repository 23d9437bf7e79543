"""`spikescale generate`: text on standard output, speed on standard error, bad input in one line."""

import re
from pathlib import Path

import pytest
import torch

from spikescale.cli.main import main
from spikescale.config import ModelConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.model import SpikeGPT
from spikescale.model.store import save_model_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained byte model that prefers lower-case letters, so that its text is text."""
    config = ModelConfig(layers=1, width=16, vocab_size=256, context_length=32, binary_embedding=False)
    weights = {name: p.detach().clone() for name, p in SpikeGPT(config, seed=1).named_parameters()}
    weights["ln_out.bias"] = torch.ones(16)
    weights["head.weight"] = 0.02 * torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    weights["head.weight"][97:123] += 1
    folder = tmp_path_factory.mktemp("models") / "letters"
    save_model_folder(folder, weights, config, make_tokenizer("byte"), {})
    return folder


def generated(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    assert main(["generate", *map(str, words)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_the_prompt_is_continued_and_the_speed_goes_to_standard_error(model_folder, capsys):
    out, err = generated(capsys, model_folder, "--prompt", "Once é", "--tokens", 30)
    assert re.fullmatch(r"Once é[a-z]{30}\n", out)
    assert re.fullmatch(r"30 tokens in \d+\.\d\d s, \d+\.\d tokens/s on cpu\n", err)


def test_the_seed_alone_decides_the_text(model_folder, capsys):
    first, again, other = (
        generated(capsys, model_folder, "--tokens", 40, "--seed", seed)[0] for seed in (5, 5, 6)
    )
    assert first == again != other


def test_several_samples_are_labelled_blocks(model_folder, capsys):
    out, err = generated(
        capsys, model_folder, "--prompt", "x", "--samples", 3, "--tokens", 8, "--backend", "reference"
    )
    blocks = re.findall(r"--- sample (\d) of 3\n(x[a-z]{8})\n", out)
    assert [number for number, _ in blocks] == ["1", "2", "3"]
    assert len({text for _, text in blocks}) == 3
    assert err.startswith("24 tokens in ")


def test_the_prompt_can_come_from_a_file(model_folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Two\nlines", encoding="utf-8")
    out, _ = generated(capsys, model_folder, "--prompt-file", tmp_path / "prompt.txt", "--tokens", 4)
    assert re.fullmatch(r"Two\nlines[a-z]{4}\n", out)


def test_greedy_text_needs_no_seed(model_folder, capsys):
    words = (model_folder, "--temperature", 0, "--tokens", 20, "--seed")
    assert generated(capsys, *words, 1)[0] == generated(capsys, *words, 2)[0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt: cannot be read"),
        (["--temperature", "-1"], "temperature = -1.0: must be 0 or more"),
        (["--top-p", "0"], "top_p = 0.0: must be above 0 and at most 1"),
        (["--samples", "0"], "--samples 0: must be 1 or more"),
        (["--device", "abacus"], "device abacus: not available"),
    ],
)
def test_bad_options_are_refused_in_one_line(model_folder, words, complaint, capsys):
    assert main(["generate", str(model_folder), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {complaint}")
    assert err.count("\n") == 1


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["generate", str(tmp_path)]) == 2
    assert "no model found" in capsys.readouterr().err
