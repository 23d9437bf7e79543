"""The planner's parameters are those of the models."""

import pytest
import torch
from workloads import PRESETS, VARIANTS, small

from spikescale.config import load_model_preset
from spikescale.errors import UserError
from spikescale.model import SpikeGPT
from spikescale.planning.parameters import count, count_matrices, count_projections, largest, parameters
from spikescale.training.flops import training_flops_per_token


def built(config):
    with torch.device("meta"):
        return SpikeGPT(config)


@pytest.mark.parametrize(("preset", "symbols"), PRESETS.items())
def test_counts_are_those_of_the_model(preset, symbols):
    config = load_model_preset(preset, vocab_size=symbols)
    model = built(config)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert count(config) == model.count_parameters()
    assert count_matrices(config) == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert largest(config) == max(p.numel() for p in model.parameters())
    assert sorted(shapes) == sorted(p.shape for p in parameters(config) for _ in range(p.count))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_same_parameters(variant):
    config = small(variant)
    assert count(config) == built(config).count_parameters()


def test_projections_are_those_that_operations_are_counted_for():
    config = load_model_preset("216m", vocab_size=50277)
    assert 6 * count_projections(config) == training_flops_per_token(config)


def test_the_documented_counts():
    assert count(load_model_preset("46m", vocab_size=256)) == 41_226_240
    assert count(load_model_preset("216m", vocab_size=50277)) == 215_399_424
    assert count(load_model_preset("430m", vocab_size=50277)) == 430_397_440


def test_tensor_ranks_share_matrices_and_copy_the_rest():
    config = load_model_preset("216m", vocab_size=50277)
    copied = sum(p.elements() for p in parameters(config) if p.split is None)
    # 50277 is odd: one row of padding in the embedding and one in the head.
    assert 2 * count(config, tensor=2) == count(config) + copied + 2 * config.width


def test_a_model_without_vocabulary_is_refused():
    with pytest.raises(UserError, match="vocab_size is not set"):
        parameters(load_model_preset("tiny"))
