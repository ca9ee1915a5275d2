"""Groups whose completions all earned the same: their advantages are 0, so they teach nothing but the KL.

The recipe keeps them (as released), skips them, or has other prompts sampled in their place.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from apo_lora.apo import without_variance
from apo_lora.policy.batches import Batch, with_rows_replaced
from apo_lora.rollout.credit import CreditRule, Rollout, ScoredRollout

MOST_ROUNDS = 2
"""Times that other prompts are sampled; each costs generation time, and on easy or hopeless data all are in vain."""

Sampled = tuple[dict[str, Any], Rollout]


def resampled(
    batch: dict[str, Any],
    scored: ScoredRollout,
    credit_of: CreditRule,
    draw: Callable[[int, int], list[dict[str, Any]]],
    sample: Callable[[list[dict[str, Any]]], Sampled],
) -> tuple[dict[str, Any], ScoredRollout, int]:
    """The rollout with other prompts replacing groups without variance, and the number of replacements.

    `draw(number, round)` gives other prompts' items, and `sample(items)` a rollout of them, G items to a prompt. Groups
    that still have no variance after MOST_ROUNDS stay.
    """
    num_generations, sampled = credit_of.num_generations, 0
    for number in range(MOST_ROUNDS):
        groups = without_variance(scored.rewards_NG).nonzero().flatten().tolist()
        if not groups:
            break
        others = [item for item in draw(len(groups), number) for _ in range(num_generations)]
        other_batch, other_rollout = sample(others)
        rows = [group * num_generations + place for group in groups for place in range(num_generations)]
        batch = with_rows_replaced(batch, rows, other_batch)
        scored = credit_of(scored.rollout.with_rows_replaced(rows, other_rollout))
        sampled += len(groups)
    return batch, scored, sampled


def without_rows(batch: Batch, is_skipped_B: Tensor) -> dict[str, Any]:
    """The batch with those rows masked out: no pass computes them, and no mean counts them."""
    return {**batch, "completion_mask": batch["completion_mask"] * ~is_skipped_B.unsqueeze(-1)}
