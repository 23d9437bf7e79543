"""muP: what a model computes, and its best learning rate, stay where they are when it gets wider."""

import functools

import pytest
import torch

from spikescale.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from spikescale.model import SpikeGPT, language_model_loss
from spikescale.training.engine import apply_optimizer_settings, build_optimizer
from spikescale.training.parameter_groups import group_settings

SYMBOLS, LENGTH, BATCH = 32, 32, 16
TUNED = 32


def config(width, transfer, lr=1e-2):
    model = ModelConfig(
        layers=2,
        width=width,
        vocab_size=SYMBOLS,
        context_length=LENGTH,
        binary_embedding=False,
        width_transfer=transfer,
    )
    train = TrainConfig(lr=lr, min_lr=0.0, optimizer="adamw", weight_decay=0.1)
    return RunConfig(data=DataConfig(path="unused"), model=model, train=train)


@functools.cache
def batches(count):
    """Sequences in which each symbol is one of three that the two before it allow."""
    generator = torch.Generator().manual_seed(0)
    allowed = torch.randint(SYMBOLS, (SYMBOLS, SYMBOLS, 3), generator=generator)
    found = []
    for _ in range(count):
        tokens = torch.randint(SYMBOLS, (BATCH, LENGTH + 1), generator=generator)
        for t in range(2, LENGTH + 1):
            pick = torch.randint(3, (BATCH,), generator=generator)
            tokens[:, t] = allowed[tokens[:, t - 1], tokens[:, t - 2], pick]
        found.append(tokens)
    return found


def train(width, transfer, lr, steps):
    """Losses and root mean squares of the logits, by step."""
    settings = config(width, transfer, lr)
    model = SpikeGPT(settings.model)
    optimizer = build_optimizer(model, settings)
    losses, sizes = [], []
    for step, tokens in enumerate(batches(steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0) * min(1, (step + 1) / 5)
        logits, _ = model(tokens[:, :-1])
        loss, _ = language_model_loss(logits, tokens[:, 1:], 0.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        sizes.append(float(logits.detach().square().mean().sqrt()))
    return losses, sizes


def test_groups_scale_rates_by_width_and_keep_the_decay():
    settings = config(128, TUNED)
    model = SpikeGPT(settings.model)
    optimizer = build_optimizer(model, settings)
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = by_id[id(parameter)]
        is_hidden = parameter.ndim == 2 and name != "embedding.weight"
        assert group["lr_scale"] == (TUNED / 128 if is_hidden else 1.0)
        if parameter.ndim == 2:
            assert group["lr_scale"] * group["weight_decay"] == pytest.approx(0.1)
    # At the tuned width it is the ordinary optimizer in another order of groups.
    tuned = group_settings(config(TUNED, TUNED).model, 0.1)
    assert all(group.get("lr_scale", 1.0) == 1.0 for group in tuned)
    assert len(build_optimizer(model, config(128, None)).param_groups) == 2


def test_settings_come_back_after_a_checkpoint_brought_others():
    settings = config(128, TUNED)

    class Engine:
        optimizer = build_optimizer(SpikeGPT(settings.model), settings)

    for group in Engine.optimizer.param_groups:
        group.update(lr_scale=7.0, weight_decay=9.0)
    apply_optimizer_settings(Engine, settings)
    found = [(group["lr_scale"], group["weight_decay"]) for group in Engine.optimizer.param_groups]
    assert found == [(0.25, pytest.approx(0.4)), (1.0, 0.0), (1.0, 0.1)]


def test_logits_stay_as_large_in_wider_models():
    # The coordinate check: after a dozen steps at the same rate.
    widths = (32, 64, 128)
    transferred = [train(width, TUNED, 4e-3, 12)[1][-1] for width in widths]
    assert max(transferred) < 1.12 * min(transferred)
    plain = [train(width, None, 4e-3, 12)[1][-1] for width in widths]
    assert plain[2] > 1.3 * plain[0]


@pytest.mark.slow
def test_better_learning_rate_stays_when_the_width_doubles():
    def better(width, transfer, rates=(4e-3, 8e-3)):
        ends = [sum(train(width, transfer, lr, 200)[0][-5:]) for lr in rates]
        return rates[ends.index(min(ends))]

    assert better(32, TUNED) == better(64, TUNED) == 8e-3
    assert better(64, None) == 4e-3
