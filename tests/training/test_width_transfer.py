"""muP: what a model computes, and its best learning rate, stay where they are when it gets wider."""

import importlib
from pathlib import Path

import pytest

from spikescale.model import SpikeGPT
from spikescale.training.engine import apply_optimizer_settings, build_optimizer
from spikescale.training.parameter_groups import group_settings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TUNED = 32


@pytest.fixture
def sweep(monkeypatch):
    """The benchmark whose models these are."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("width_transfer")


def test_groups_scale_rates_by_width_and_keep_the_decay(sweep):
    settings = sweep.config(128, TUNED)
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
    tuned = group_settings(sweep.config(TUNED, TUNED).model, 0.1)
    assert all(group.get("lr_scale", 1.0) == 1.0 for group in tuned)
    assert len(build_optimizer(model, sweep.config(128, None)).param_groups) == 2


def test_settings_come_back_after_a_checkpoint_brought_others(sweep):
    settings = sweep.config(128, TUNED)

    class Engine:
        optimizer = build_optimizer(SpikeGPT(settings.model), settings)

    for group in Engine.optimizer.param_groups:
        group.update(lr_scale=7.0, weight_decay=9.0)
    apply_optimizer_settings(Engine, settings)
    found = [(group["lr_scale"], group["weight_decay"]) for group in Engine.optimizer.param_groups]
    assert found == [(0.25, pytest.approx(0.4)), (1.0, 0.0), (1.0, 0.1)]


def test_logits_stay_as_large_in_wider_models(sweep):
    # The coordinate check: after a dozen steps at the same rate.
    widths = (32, 64, 128)
    transferred = [sweep.train(width, TUNED, 4e-3, 12)[1][-1] for width in widths]
    assert max(transferred) < 1.12 * min(transferred)
    plain = [sweep.train(width, None, 4e-3, 12)[1][-1] for width in widths]
    assert plain[2] > 1.3 * plain[0]


@pytest.mark.slow
def test_better_learning_rate_stays_when_the_width_doubles(sweep):
    def better(width, transfer, rates=(4e-3, 8e-3)):
        ends = [sum(sweep.train(width, transfer, lr, 200)[0][-5:]) for lr in rates]
        return rates[ends.index(min(ends))]

    assert better(32, TUNED) == better(64, TUNED) == 8e-3
    assert better(64, None) == 4e-3
