"""Completions of another engine: their importance weights, and what they change."""

import math

import pytest
import torch

from apo_lora.apo import apo_loss, importance_weights
from apo_lora.rollout.off_policy import SAMPLER_LOGPS, correction

OLD = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.1, 0.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_a_weight_is_the_ratio_of_the_probabilities_up_to_the_cap():
    sampler = torch.log(torch.tensor([[0.5, 0.2, 0.1]]))
    old = torch.log(torch.tensor([[0.25, 0.3, 0.9]]))
    torch.testing.assert_close(importance_weights(old, sampler, 2.0), torch.tensor([[0.5, 1.5, 2.0]]))


def test_equal_log_probs_weigh_exactly_1_and_so_does_an_unknown_one():
    assert importance_weights(OLD, OLD.clone(), 2.0).tolist() == torch.ones_like(OLD).tolist()
    assert importance_weights(OLD, torch.full_like(OLD, math.nan), 2.0).tolist() == torch.ones_like(OLD).tolist()


def test_a_wild_log_prob_stays_finite():
    assert torch.isfinite(importance_weights(OLD, torch.full_like(OLD, -1e30), math.inf)).all()


def loss_of(weights):
    logps = OLD.clone().requires_grad_()
    loss, figures = apo_loss(
        logps, OLD, OLD - 0.1, MASK, torch.tensor([1.0, -0.5]), torch.tensor([0.3, 1.0]),
        beta=0.04, epsilon=0.2, num_tokens=5, num_sequences=2, policy_weights_BT=weights,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), logps.grad, figures


def test_weights_of_1_give_exactly_the_loss_without_them():
    (plain, gradient, _), (weighted, same, _) = loss_of(None), loss_of(torch.ones_like(OLD))
    assert torch.equal(plain, weighted) and torch.equal(gradient, same)


def test_weights_multiply_the_policy_term_and_not_the_kl():
    """On-policy, the policy term of a token is -A, and its gradient -A / tokens."""
    weights = torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.25, 9.0]])
    (_, before, plain), (_, after, weighted) = loss_of(None), loss_of(weights)
    assert weighted["kl_loss"] == plain["kl_loss"] and weighted["kl"] == plain["kl"]
    expected = -(1.0 * (0.5 + 2.0 + 1.0) - 0.5 * (1.0 + 0.25)) / 5
    assert weighted["policy_loss"].item() == pytest.approx(expected) != plain["policy_loss"].item()
    advantages = torch.tensor([[1.0], [-0.5]])
    torch.testing.assert_close(after - before, -(weights - 1) * advantages * MASK / 5)


def batch(sampler):
    return {"completion_mask": MASK, SAMPLER_LOGPS: sampler}


def test_figures_are_means_over_the_steps_tokens_without_padding():
    sampler = OLD - torch.tensor([[0.0, math.log(1.5), 0.0], [math.log(4.0), 0.0, 50.0]])
    found = correction(batch(sampler), OLD, 2.0, 5)
    assert found.figures["importance_weight"].item() == pytest.approx((3 + 1.5 + 2.0) / 5)
    assert found.figures["sampler_difference"].item() == pytest.approx((math.log(1.5) + math.log(4.0)) / 5)
    assert found.largest["importance_weight_max"].item() == pytest.approx(2.0)


def test_without_the_samplers_log_probs_or_a_cap_nothing_is_weighted():
    assert correction({"completion_mask": MASK}, OLD, 2.0, 5) == (None, {}, {})
    uncapped = correction(batch(OLD - 3.0), OLD, None, 5)
    assert uncapped.weights_BT is None and uncapped.figures["sampler_difference"].item() == pytest.approx(3.0)


def test_a_pass_without_a_token_has_no_largest_weight():
    found = correction({**batch(OLD), "completion_mask": torch.zeros_like(MASK)}, OLD, 2.0, 5)
    assert found.largest == {} and found.figures["importance_weight"] == 0
