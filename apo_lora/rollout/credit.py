"""What one rollout left behind, over all processes, and what it earns: the input of apo.assign_credit.

Shape suffixes as in apo.py; B = N*G completions, F reward functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from apo_lora.apo import Credit, assign_credit
from apo_lora.config import APOConfig
from apo_lora.run.metrics import rollout_metrics


@dataclass(frozen=True)
class Rollout:
    """In the order of the rollout, process after process: prompt by prompt, G completions each."""

    indices: list[int | None]
    """The column `index` of each completion's prompt, where the data set has one."""
    texts: list[str]
    adapter_steps: list[int]
    """Optimizer steps that the adapter which sampled each completion had seen."""
    rewards_BF: Tensor
    lengths_B: Tensor
    """Tokens, the end token included."""
    truncated_B: Tensor
    seconds_for_rewards: float

    def staleness(self, step: int) -> float:
        """Optimizer steps between the adapters that sampled and the one after `step` steps, mean of completions."""
        return step - sum(self.adapter_steps) / len(self.adapter_steps)

    def with_rows_replaced(self, rows: Sequence[int], other: "Rollout") -> "Rollout":
        """With the completions of `other`, in order, replacing these rows."""
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

    def figures(self, reward_names: Sequence[str]) -> dict[str, float | None]:
        """For the record of the step; `reward_names` are those of the F columns."""
        groups, rollout = self.rewards_NG.shape, self.rollout
        columns = zip(reward_names, rollout.rewards_BF.T, strict=True)
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


@dataclass(frozen=True)
class CreditRule:
    """How rewards become credit: everything of apo.assign_credit that a run decides."""

    num_generations: int
    weights_F: Tensor
    """A factor for each reward function."""
    correct_column: int
    """The reward function that decides whether a completion is correct."""
    correct_from: float
    """Smallest value of that reward that counts as correct."""
    dads: str | None
    stcr: float | None
    stcr_amplify_positive: bool
    scale_rewards: str

    def __call__(self, rollout: Rollout) -> ScoredRollout:
        groups = (-1, self.num_generations)
        rewards_NG = (rollout.rewards_BF * self.weights_F.to(rollout.rewards_BF.device)).sum(dim=-1).view(groups)
        correct_NG = (rollout.rewards_BF[:, self.correct_column] >= self.correct_from).float().view(groups)
        credit = assign_credit(
            rewards_NG,
            correct_NG,
            rollout.lengths_B.view(groups),
            dads=self.dads is not None,
            dads_shape=self.dads or "constant",
            stcr=self.stcr is not None,
            stcr_base=self.stcr or 1.0,
            stcr_amplify_positive=self.stcr_amplify_positive,
            scale_rewards=self.scale_rewards,
        )
        return ScoredRollout(rollout, rewards_NG, correct_NG, credit)


def credit_rule(config: APOConfig, reward_names: Sequence[str], weights_F: Tensor) -> CreditRule:
    """Raises ValueError where `config.correct_by` names none of the reward functions."""
    if config.correct_by not in (None, *reward_names):
        raise ValueError(
            f"APOConfig: correct_by={config.correct_by!r} must be a reward function: {', '.join(reward_names)}"
        )
    return CreditRule(
        num_generations=config.num_generations,
        weights_F=weights_F,
        correct_column=reward_names.index(config.correct_by) if config.correct_by else 0,
        correct_from=config.correct_from,
        dads=config.dads,
        stcr=config.stcr,
        stcr_amplify_positive=config.stcr_amplify_positive,
        scale_rewards=config.scale_rewards,
    )
