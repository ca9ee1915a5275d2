"""The figures of one optimizer step, by their names in run/figures.py. None stands where a mean has nothing to average.

Shape suffixes as in apo.py.
"""

from collections import defaultdict

import torch
from torch import Tensor

from apo_lora.apo import Credit, token_kl, without_variance
from apo_lora.machine import ranks


def _mean(values: Tensor) -> float | None:
    return values.float().mean().item() if values.numel() else None


def rollout_metrics(
    rewards_NG: Tensor, correct_NG: Tensor, lengths_NG: Tensor, truncated_NG: Tensor, credit: Credit
) -> dict[str, float | None]:
    """What a rollout tells before any gradient. Lengths in tokens; fractions and accuracies in 0..1."""
    right = correct_NG.bool()
    accuracy_N = correct_NG.mean(dim=-1)
    amplified = credit.stcr_multipliers_NG > 1
    return {
        "reward": _mean(rewards_NG),
        "reward_std": rewards_NG.float().std().item(),
        "accuracy": _mean(correct_NG),
        "advantage_std": credit.advantages_NG.float().std().item(),
        "zero_variance_groups": _mean(without_variance(rewards_NG)),
        "all_right_groups": _mean(accuracy_N == 1),
        "all_wrong_groups": _mean(accuracy_N == 0),
        "length": _mean(lengths_NG),
        "length_correct": _mean(lengths_NG[right]),
        "length_wrong": _mean(lengths_NG[~right]),
        "truncated": _mean(truncated_NG),
        "difficulty": _mean(credit.difficulty_N),
        "dads_weight_positives": _mean(credit.kl_weights_NG[credit.advantages_NG > 0]),
        "stcr_amplified": float(amplified.sum().item()),
        "stcr_multiplier": _mean(credit.stcr_multipliers_NG[amplified]),
    }


class TokenMeans:
    """Means over completion tokens of one optimizer step, gathered micro-batch by micro-batch.

    KL over all, positive (A > 0) and other sequences; entropy over all, correct and wrong completions.
    """

    def __init__(self):
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    @torch.no_grad()
    def add(
        self,
        logps_BT: Tensor,
        ref_logps_BT: Tensor,
        entropies_BT: Tensor,
        mask_BT: Tensor,
        advantages_B: Tensor,
        correct_B: Tensor,
    ) -> None:
        mask_BT = mask_BT.bool()
        positive_B, right_B = advantages_B > 0, correct_B.bool()
        every_B = torch.ones_like(right_B)
        kl_BT = token_kl(logps_BT, ref_logps_BT)
        for name, values_BT, rows_B in (
            ("kl", kl_BT, every_B),
            ("kl_positives", kl_BT, positive_B),
            ("kl_negatives", kl_BT, ~positive_B),
            ("entropy", entropies_BT, every_B),
            ("entropy_correct", entropies_BT, right_B),
            ("entropy_wrong", entropies_BT, ~right_B),
        ):
            chosen_BT = mask_BT & rows_B.unsqueeze(-1)
            self.sums[name] += values_BT[chosen_BT].sum().item()
            self.counts[name] += chosen_BT.sum().item()

    def over_ranks(self) -> "TokenMeans":
        """Of all processes."""
        total = TokenMeans()
        total.sums.update(ranks.summed(self.sums))
        total.counts.update(ranks.summed(self.counts))
        return total

    def means(self) -> dict[str, float | None]:
        return {name: self.sums[name] / count if count else None for name, count in self.counts.items()}
