"""The figures of a step, by hand; and intervals that are honest at the ends."""

import math

import pytest
import torch

from apo_lora.apo import assign_credit
from apo_lora.run.metrics import TokenMeans, rollout_metrics


def test_rollout_figures():
    correct = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    lengths = torch.tensor([[10.0, 20.0, 5.0, 10.0], [8.0, 8.0, 8.0, 8.0], [30.0, 30.0, 30.0, 30.0]])
    truncated = (lengths == 30).float()
    credit = assign_credit(correct, correct, lengths, stcr_base=1.1)
    figures = rollout_metrics(correct, correct, lengths, truncated, credit)
    assert figures["accuracy"] == pytest.approx(5 / 12)
    assert figures["zero_variance_groups"] == pytest.approx(2 / 3)
    assert figures["all_right_groups"] == figures["all_wrong_groups"] == pytest.approx(1 / 3)
    assert figures["length_correct"] == pytest.approx((10 + 4 * 8) / 5)
    assert figures["length_wrong"] == pytest.approx((20 + 5 + 10 + 4 * 30) / 7)
    assert figures["truncated"] == pytest.approx(1 / 3)
    assert figures["stcr_amplified"] == 1 and figures["stcr_multiplier"] == pytest.approx(2 - 1.1**-10)
    assert figures["dads_weight_positives"] == pytest.approx(1 - math.exp(-math.e / 4))


def test_figures_without_anything_to_average_are_none():
    nothing = torch.zeros(1, 2)
    figures = rollout_metrics(nothing, nothing, nothing + 3, nothing, assign_credit(nothing, nothing, nothing + 3))
    assert figures["length_correct"] is None and figures["dads_weight_positives"] is None
    assert figures["stcr_multiplier"] is None and figures["length_wrong"] == 3


def test_token_means_add_over_micro_batches():
    entropies = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, 9.0]])
    logps = torch.zeros(2, 3)
    ref = torch.tensor([[-0.5, 0.0, 9.0], [0.2, 0.2, 0.2]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    advantages, correct = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])
    means = TokenMeans()
    for row in (slice(0, 1), slice(1, 2)):
        means.add(logps[row], ref[row], entropies[row], mask[row], advantages[row], correct[row])
    figures = means.means()
    assert figures["entropy"] == pytest.approx(25 / 5)
    assert figures["entropy_correct"] == 2 and figures["entropy_wrong"] == 7
    k3 = [math.exp(-0.5) + 0.5 - 1, math.exp(0.2) - 0.2 - 1]
    assert figures["kl_positives"] == pytest.approx(k3[0] / 2, rel=1e-4)
    assert figures["kl_negatives"] == pytest.approx(k3[1], rel=1e-4)
    assert figures["kl"] == pytest.approx((k3[0] + 3 * k3[1]) / 5, rel=1e-4)
