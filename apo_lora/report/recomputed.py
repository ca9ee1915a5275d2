"""The credit of a run's completions computed again, from their rewards and lengths in completions.jsonl.

So the record shows by itself that training gave each completion what apo.assign_credit says.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, count, groupby
from typing import TYPE_CHECKING, NamedTuple

from apo_lora.recipe.schema import Recipe
from apo_lora.report.runs import Row, Run, recorded_groups

if TYPE_CHECKING:
    from torch import Tensor

CREDIT = ("reward", "correct", "advantage", "kl_weight", "stcr_multiplier")
"""What is recomputed of each completion."""

ROUNDING = 1e-5
"""Largest difference that counts as rounding, relative to values above 1: a GPU adds up float32 in another order."""


class Recomputed(NamedTuple):
    compared: int
    """Completions."""
    largest: float = 0.0
    """Difference from the record."""
    differing: int = 0
    """Completions of which a value differs by more than rounding."""
    first: str = ""
    """Where the first of them is, and what differs."""
    left_out: int = 0
    """Completions at a cut: of a group that is not whole, or of a rollout, where its rewards are scaled together."""
    obstacle: str = ""
    """Why nothing could be compared."""

    @property
    def text(self) -> str:
        if self.obstacle:
            return f"not possible, {self.obstacle}"
        if self.differing:
            found = f"{self.differing:,} of {self.compared:,} completions differ from the record, first {self.first}"
        else:
            found = f"{self.compared:,} completions, largest difference {self.largest:.1g}: equal to the record"
        left_out = f"; {self.left_out:,} more are left out, whose group or rollout is not whole"
        return found + left_out if self.left_out else found


def recomputed_credit(run: Run) -> Recomputed:
    if not run.folder.completions.is_file() and not run.recipe.output.log_completions:
        return Recomputed(0, obstacle="completions were not recorded (output.log_completions is false)")
    return recomputed(recorded_groups(run), run.recipe)


def recomputed(groups: Iterable[Sequence[Row]], recipe: Recipe) -> Recomputed:
    """Of the rows of completions.jsonl, a list per prompt, in the file's order; by the recipe as trained."""
    size, functions = recipe.grpo.num_generations, recipe.rewards.functions
    least = recipe.prompts_per_rollout if recipe.grpo.scale_rewards == "batch" else 1
    lines, compared, largest, differing, first, left_out = count(1), 0, 0.0, 0, "", 0
    for _, of_step in groupby(groups, key=lambda group: group[0].get("step")):  # a step begins with a rollout, or none
        rollout = [[(next(lines), row) for row in group] for group in of_step]
        whole = [group for group in rollout if len(group) == size]
        numbered = list(chain.from_iterable(whole)) if len(whole) >= least else []
        left_out += sum(map(len, rollout)) - len(numbered)
        if not numbered:
            continue
        rows = [row for _, row in numbered]
        if any("reward" not in row or len(row.get("rewards") or ()) != len(functions) for row in rows):
            return Recomputed(0, obstacle=f"the rewards by function ({', '.join(functions)}) were not recorded")
        recorded_BK, again_BK = _recorded_and_again(rows, recipe)
        apart_BK = (recorded_BK - again_BK).abs()
        differs_BK = ~(apart_BK <= ROUNDING * again_BK.abs().clamp(min=1.0))  # NaN differs
        compared += len(rows)
        largest = max(largest, apart_BK.max().item())
        differing += int(differs_BK.any(dim=-1).sum())
        if differs_BK.any() and not first:
            place, column = differs_BK.nonzero()[0].tolist()
            line, row = numbered[place]
            first = (
                f"line {line} (step {row.get('step')}, row {row.get('row')}, {str(row.get('prompt'))[:60]!r}): "
                f"{CREDIT[column]} {recorded_BK[place, column]:.7g}, recomputed {again_BK[place, column]:.7g}"
            )
    if not compared:
        return Recomputed(0, obstacle="no whole group of completions is recorded")
    return Recomputed(compared, largest, differing, first, left_out)


def _recorded_and_again(rows: Sequence[Row], recipe: Recipe) -> "tuple[Tensor, Tensor]":
    """(B, K) each, K as in CREDIT; in float32 as in training, since whether rewards are equal depends on it."""
    import torch

    from apo_lora.apo import assign_credit

    rewards, apo, groups = recipe.rewards, recipe.apo, (-1, recipe.grpo.num_generations)
    rewards_BF = torch.tensor([row["rewards"] for row in rows], dtype=torch.float32)
    weights_F = torch.tensor(rewards.weights or [1.0] * len(rewards.functions), dtype=torch.float32)
    correct_B = rewards_BF[:, rewards.functions.index(rewards.correct_by)] >= rewards.correct_from
    rewards_NG, correct_NG = (rewards_BF * weights_F).sum(dim=-1).view(groups), correct_B.float().view(groups)
    credit = assign_credit(
        rewards_NG,
        correct_NG,
        torch.tensor([row["length"] for row in rows], dtype=torch.float32).view(groups),
        dads=apo.dads is not None,
        dads_shape=apo.dads or "constant",
        stcr=apo.stcr is not None,
        stcr_base=apo.stcr or 1.0,
        stcr_amplify_positive=apo.stcr_amplify_positive,
        scale_rewards=recipe.grpo.scale_rewards,
    )
    again = (rewards_NG, correct_NG, credit.advantages_NG, credit.kl_weights_NG, credit.stcr_multipliers_NG)
    recorded_BK = torch.tensor([[float(row[name]) for name in CREDIT] for row in rows], dtype=torch.float64)
    return recorded_BK, torch.stack(again).flatten(1).T.double()
