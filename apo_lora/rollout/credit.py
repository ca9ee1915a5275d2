"""What one rollout left behind, over all processes, and what it earns: the input of apo.assign_credit.

Shape suffixes as in apo.py; B = N*G completions, F reward functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from apo_lora.apo import Credit, assign_credit
from apo_lora.recipe.schema import Recipe
from apo_lora.run.metrics import rollout_metrics


@dataclass(frozen=True)
class Rollout:
    """In the order of the rollout, process after process: prompt by prompt, G completions each."""

    indices: list[int]
    """Which example each completion answers."""
    golds: list[str]
    texts: list[str]
    rewards_BF: Tensor
    lengths_B: Tensor
    """Tokens, the end token included."""
    truncated_B: Tensor
    seconds_for_rewards: float

    def with_rows_replaced(self, rows: Sequence[int], other: "Rollout") -> "Rollout":
        """With the completions of `other`, in order, in the place of these."""
        places = list(range(len(self.texts)))
        for number, row in enumerate(rows):
            places[row] = len(places) + number

        def merged(own: Any, others: Any) -> Any:
            return torch.cat([own, others])[places] if isinstance(own, Tensor) else [[*own, *others][i] for i in places]

        names = [field.name for field in fields(self) if field.name != "seconds_for_rewards"]
        return replace(self, **{name: merged(getattr(self, name), getattr(other, name)) for name in names})


@dataclass(frozen=True)
class ScoredRollout:
    rollout: Rollout
    rewards_NG: Tensor
    correct_NG: Tensor
    credit: Credit

    def figures(self, recipe: Recipe) -> dict[str, float | None]:
        """For the record of the step."""
        groups, rollout = self.rewards_NG.shape, self.rollout
        columns = zip(recipe.rewards.functions, rollout.rewards_BF.T, strict=True)
        return {
            **rollout_metrics(
                self.rewards_NG,
                self.correct_NG,
                rollout.lengths_B.view(groups),
                rollout.truncated_B.view(groups),
                self.credit,
            ),
            **{f"reward_{name}": column.mean().item() for name, column in columns},
            "generated_tokens": rollout.lengths_B.sum().item(),
        }


def score_rollout(rollout: Rollout, recipe: Recipe) -> ScoredRollout:
    """Weighs the rewards, and gives every completion its credit by the recipe's APO keys."""
    groups = (-1, recipe.grpo.num_generations)
    weights_F = rollout.rewards_BF.new_tensor(recipe.rewards.weights or [1.0] * rollout.rewards_BF.shape[1])
    rewards_NG = (rollout.rewards_BF * weights_F).sum(dim=-1).view(groups)
    correct_column = recipe.rewards.functions.index(recipe.rewards.correct_by)
    correct_NG = (rollout.rewards_BF[:, correct_column] == 1).float().view(groups)
    apo = recipe.apo
    credit = assign_credit(
        rewards_NG,
        correct_NG,
        rollout.lengths_B.view(groups),
        dads=apo.dads is not None,
        dads_shape=apo.dads or "constant",
        stcr=apo.stcr is not None,
        stcr_base=apo.stcr or 1.0,
        stcr_amplify_positive=apo.stcr_amplify_positive,
    )
    return ScoredRollout(rollout, rewards_NG, correct_NG, credit)
