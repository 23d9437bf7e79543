"""A run that learns from a trained model beside the text."""

import json
import math

import pytest
import torch
from launching import TINY

from spikescale.config import ModelConfig, RunConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.errors import UserError
from spikescale.model import SpikeGPT, language_model_loss
from spikescale.model.store import save_model_folder
from spikescale.training.distillation import Teacher, divergence_from
from spikescale.training.pretrain import main


def test_the_divergence_is_that_of_two_distributions():
    # Probabilities 1/4, 3/4 against 1/2, 1/2; at temperature 2 their roots, normalised.
    teacher = torch.tensor([[[1.0, 3.0]]]).log()
    student = torch.zeros(1, 1, 2)
    wanted = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert divergence_from(teacher, student, 1.0).item() == pytest.approx(wanted, rel=1e-5)
    root = [1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))]
    wanted = 4 * sum(p * math.log(p / 0.5) for p in root)
    assert divergence_from(teacher, student, 2.0).item() == pytest.approx(wanted, rel=1e-5)


def test_the_loss_weighs_text_and_teacher_and_reports_the_text():
    torch.manual_seed(0)
    config = ModelConfig(variant="rwkv", binary_embedding=False, layers=1, width=8, vocab_size=20)
    teacher = Teacher(SpikeGPT(config), 0.25, 1.5)
    tokens, targets = torch.randint(0, 20, (2, 2, 5))
    logits = torch.randn(2, 5, 20, requires_grad=True)
    total, reported = teacher.loss(logits, tokens, targets, None, 1e-3)
    plain, cross_entropy = language_model_loss(logits, targets, 1e-3)
    taught = teacher.model(tokens)[0]
    expected = plain + 0.25 * (divergence_from(taught, logits, 1.5) - cross_entropy)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(reported, cross_entropy)
    total.backward()
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.fixture
def teacher_folder(tmp_path):
    tokenizer = make_tokenizer("byte")
    config = ModelConfig(variant="rwkv", binary_embedding=False, layers=1, width=8)
    config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    save_model_folder(tmp_path / "teacher", SpikeGPT(config).state_dict(), config, tokenizer, {})
    return tmp_path / "teacher"


def test_a_run_learns_from_its_teacher_alone_where_the_text_has_no_weight(run_file, tmp_path, teacher_folder):
    words = [f"train.distill_from={teacher_folder}", "train.distill_weight=1"]
    words += ["train.steps=4", "train.warmup_steps=0", "train.log_every=1"]
    assert main(["--config", str(run_file), *words]) == 0
    lines = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "lr" in record]
    # The untrained teacher guesses evenly; text teaches the same run to below 4.5 in two steps.
    assert losses == pytest.approx([math.log(257)] * 4, abs=0.3)


def test_a_teacher_that_reads_other_ids_is_refused(teacher_folder):
    config = RunConfig.model_validate(
        {**TINY, "data": {"path": "x"}, "train": {"distill_from": teacher_folder}}
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 300})})
    with pytest.raises(UserError, match="reads other ids"):
        Teacher.of(config, make_tokenizer("byte"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"does not work with parallel\.tensor or parallel\.context"):
        RunConfig.model_validate(
            {"data": {"path": "x"}, "parallel": {"context": 2}, "train": {"distill_from": teacher_folder}}
        )
