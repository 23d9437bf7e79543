"""Training on a mixture, with shorter rows at first, states cleared between documents, and masked targets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import TINY, launch

from spikescale.config import DataConfig, ModelConfig, load_config
from spikescale.errors import UserError
from spikescale.evaluation.language_model import LanguageModelResult
from spikescale.model import SpikeGPT, language_model_loss
from spikescale.tracking.metrics_file import read_metrics
from spikescale.training.samples import (
    IGNORED,
    context_length_at,
    document_starts,
    shortened,
    without_document_starts,
)
from spikescale.training.source_losses import SourceLosses

EOS = 255


@pytest.fixture
def mixture_file(tmp_path: Path, prepared_data: Path) -> Path:
    """The corpus at word level of bytes, and a second one of digits, one to three."""
    from spikescale.cli.main import main

    digits = tmp_path / "digits"
    digits.mkdir()
    for number in range(80):
        (digits / f"{number:02d}.txt").write_text(" ".join(str(number * step) for step in range(200)))
    words = ["data", "prepare", "--source", str(digits), "--tokenizer", "byte", "--no-ray", "--quiet"]
    assert main([*words, "--output", str(tmp_path / "numbers")]) == 0
    sources = [
        {"path": str(tmp_path / "numbers"), "weight": 1},
        {"path": str(prepared_data), "name": "text", "weight": 3},
    ]
    content = {
        "output": str(tmp_path / "runs"),
        **TINY,
        "data": {"sources": sources, "curriculum": [{"until_step": 6, "context_length": 8}]},
        "model": {**TINY["model"], "reset_at_documents": True},
        "train": {**TINY["train"], "loss_mask": "document-start"},
    }
    path = tmp_path / "mixture.yaml"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mixture_trains_alike_on_one_rank_and_on_two(mixture_file: Path) -> None:
    one = launch(["--config", str(mixture_file), "name=one"])
    launch(["--config", str(mixture_file), "name=two"], "torchrun", 2)
    assert "mixture by tokens: numbers 25.00%, text 75.00%" in one.stdout
    assert "up to step 6: rows of 8 tokens" in one.stdout
    runs = []
    for name in ("one", "two"):
        metrics = read_metrics(mixture_file.parent / "runs" / name / "metrics.jsonl")
        runs.append([record for record in metrics if "loss" in record])
        valid = [record["valid_source_losses"] for record in metrics if "valid_loss" in record]
        assert valid and all(set(losses) == {"numbers", "text"} for losses in valid)
    for mine, other in zip(*runs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert mine["source_losses"] == pytest.approx(other["source_losses"], abs=1e-4)
    # 8 samples a step: 2 of numbers, 6 of text, whose losses average to the step's but for masked targets.
    for record in runs[0]:
        by_source = record["source_losses"]
        assert record["loss"] == pytest.approx(
            0.25 * by_source["numbers"] + 0.75 * by_source["text"], rel=0.01
        )


def test_rows_are_cut_without_losing_a_token() -> None:
    samples = torch.arange(2 * 13).reshape(2, 13)
    rows = shortened(samples, 4)
    assert rows.tolist()[:3] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
    assert rows.shape == (6, 5) and torch.equal(rows[3], samples[1, :5])
    assert torch.equal(shortened(samples, 12), samples)
    assert torch.equal(rows[:, 1:].reshape(2, 12), samples[:, 1:])  # every target once


def test_the_curriculum_ends_with_the_models_length() -> None:
    stages = [{"until_step": 5, "context_length": 8}, {"until_step": 9, "context_length": 16}]
    data = DataConfig.model_validate_json(json.dumps({"path": "x", "curriculum": stages}))
    assert [context_length_at(step, data, 32) for step in (1, 5, 6, 9, 10)] == [8, 8, 16, 16, 32]


def test_a_document_is_read_as_if_it_were_alone() -> None:
    """With the state cleared, what follows an end of document does not depend on what was before it."""
    config = ModelConfig(
        layers=2, width=16, vocab_size=256, context_length=16, reset_at_documents=True, backend="reference"
    )
    model = SpikeGPT(config, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # at the start little goes from one token to the next
        for weight in model.parameters():
            weight += 0.5 * torch.randn(weight.shape, generator=generator)
    first, second, rest = torch.randint(EOS, (3, 1, 7), generator=generator)
    end = torch.tensor([[EOS]])
    outcomes = []
    for before in (first, second):
        tokens = torch.cat([before, end, rest], dim=1)
        reset = document_starts(tokens, EOS)
        assert reset.nonzero().tolist() == [[0, 7]]
        outcomes.append(model(tokens, reset=reset)[0][:, 7:])
    assert torch.equal(*outcomes)
    alone, _ = model(torch.cat([end, rest], dim=1))
    torch.testing.assert_close(outcomes[0], alone, rtol=0, atol=1e-6)
    kept, _ = model(torch.cat([first, end, rest], dim=1))
    assert not torch.allclose(kept[:, 7:], alone, atol=1e-4)


def test_masked_targets_have_neither_loss_nor_gradient() -> None:
    inputs = torch.tensor([[1, EOS, 3, 4], [EOS, 2, EOS, 5]])
    targets = torch.tensor([[7, 8, 9, 1], [2, 3, 4, 5]])
    masked = without_document_starts(inputs, targets, EOS)
    assert masked.tolist() == [[7, IGNORED, 9, 1], [IGNORED, 3, IGNORED, 5]]
    logits = torch.randn(2, 4, 256, dtype=torch.float64, requires_grad=True)
    loss, reported = language_model_loss(logits, masked, masked=True)
    kept = masked != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[kept].float(), masked[kept]) * 5 / 8
    assert float(reported.detach()) == pytest.approx(float(expected.detach()))
    loss.backward()
    assert bool((logits.grad[~kept] == 0).all()) and bool((logits.grad[kept] != 0).all())


def test_losses_by_source_are_the_means_of_their_rows() -> None:
    from spikescale.evaluation.language_model import whole_token_losses

    losses = SourceLosses(["a", "b", "c"], whole_token_losses, torch.device("cpu"))
    logits, targets = torch.randn(4, 5, 11), torch.randint(11, (4, 5))
    targets[0, 2] = IGNORED
    losses.add(logits[:2], targets[:2], np.array([2, 0]))
    losses.add(logits[2:], targets[2:], np.array([0, 0]))
    rows = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    found = losses.read()
    assert set(found) == {"a", "c"}  # none of b in this step
    assert found["a"] == pytest.approx(float(rows[1:].mean()), abs=1e-6)
    assert found["c"] == pytest.approx(float(rows[0].sum() / 4), abs=1e-6)
    assert losses.read() == {}


def test_results_of_parts_are_weighted_by_their_share() -> None:
    parts = [
        LanguageModelResult.from_sum(300.0, 100, split_tokens=200, split_bytes=800, split_characters=600),
        LanguageModelResult.from_sum(100.0, 100, split_tokens=100, split_bytes=100, split_characters=100),
    ]
    whole = LanguageModelResult.weighted([(parts[0], 0.75), (parts[1], 0.25)])
    assert whole.loss == pytest.approx(0.75 * 3 + 0.25 * 1) and whole.tokens == 200
    assert whole.bytes == pytest.approx(200 * (0.75 * 4 + 0.25 * 1))
    assert LanguageModelResult.weighted([(parts[0], 1.0)]) is parts[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"data\.path is missing \(or data\.sources"),
        ({"path": "a", "sources": [{"path": "b", "weight": 1}]}, "are both given"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b", "epochs": 1}]}, "every source a weight, or"),
        ({"sources": [{"path": "x/a", "weight": 1}, {"path": "y/a", "weight": 1}]}, "names must differ"),
        ({"path": "a", "curriculum": [{"until_step": 5, "context_length": 24}]}, "24 must divide"),
        (
            {"path": "a", "curriculum": [{"until_step": 5, "context_length": 8}] * 2},
            "until_step must grow",
        ),
    ],
)
def test_data_that_cannot_be_is_refused_in_one_line(tmp_path: Path, data: dict, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"data": data, "model": {"context_length": 64}}))
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
