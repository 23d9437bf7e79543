"""The loss: cross-entropy in float32, and the logit regulariser as a gradient at the argmax."""

import math

import pytest
import torch

from spikescale.model import language_model_loss


def make_case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator) * 3
    targets = torch.randint(0, 7, (2, 5), generator=generator)
    return logits, targets


def test_cross_entropy_is_the_mean_negative_log_likelihood_and_excludes_the_regulariser():
    logits, targets = make_case()
    expected = -torch.log_softmax(logits.double(), -1).gather(-1, targets[..., None]).mean()
    for strength in (0.0, 1e-4, 1.0):
        _, cross_entropy = language_model_loss(logits, targets, strength)
        assert float(cross_entropy) == pytest.approx(float(expected), rel=1e-6)
        assert not cross_entropy.requires_grad


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    total, _ = language_model_loss(torch.zeros(1, 3, 50), torch.zeros(1, 3, dtype=torch.int64), 0.0)
    assert float(total) == pytest.approx(math.log(50), rel=1e-6)


def test_the_regulariser_adds_its_share_of_the_largest_logit_to_the_gradient_there():
    logits, targets = make_case()
    gradients = []
    for strength in (0.0, 1e-2):
        leaf = logits.clone().requires_grad_()
        language_model_loss(leaf, targets, strength)[0].backward()
        gradients.append(leaf.grad)
    added = gradients[1] - gradients[0]
    expected = torch.zeros_like(added)
    largest, where = logits.max(dim=-1, keepdim=True)
    expected.scatter_(-1, where, 1e-2 / (2 * 5) * largest)
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-8)


def test_bfloat16_logits_are_scored_in_float32():
    logits, targets = make_case()
    total, cross_entropy = language_model_loss(logits.bfloat16(), targets, 1e-4)
    assert total.dtype == cross_entropy.dtype == torch.float32
    expected, _ = language_model_loss(logits.bfloat16().float(), targets, 1e-4)
    assert float(total) == float(expected)
