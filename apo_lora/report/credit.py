"""What DADS and STCR did to the completions of a run: weights by accuracy, multipliers by excess length."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from pandas import DataFrame

from apo_lora.report.runs import COMPLETION_KEYS, Row

Points = list[tuple[float, float]]


class CreditSeen(NamedTuple):
    completions: int
    weights: Counter
    """(group accuracy, KL weight) of completions with a positive advantage, in groups that are partly right."""
    mean_weight: float
    """Over those."""
    multipliers: Counter
    """(excess tokens, multiplier) of wrong completions in groups that have a right one."""
    amplified: int
    """Completions with a multiplier above 1."""
    mean_multiplier: float
    """Over those."""


def credit_seen(groups: Iterable[list[Row]]) -> CreditSeen:
    """Counted from the rows of completions.jsonl, a list per prompt. A mean over nothing is NaN."""
    columns = sorted(COMPLETION_KEYS)
    rows = [
        [group_number, *(row[key] for key in columns)] for group_number, group in enumerate(groups) for row in group
    ]
    seen = DataFrame(rows, columns=["group", *columns]).astype({"correct": bool})
    accuracy = seen.groupby("group")["correct"].transform("mean")
    excess = seen["length"] - seen["length"].where(seen["correct"]).groupby(seen["group"]).transform("mean")
    weighted = seen[(seen["advantage"] > 0) & accuracy.between(0, 1, inclusive="neither")]["kl_weight"]
    multiplied = seen[~seen["correct"] & excess.notna()]["stcr_multiplier"]
    amplified = seen["stcr_multiplier"][seen["stcr_multiplier"] > 1]
    return CreditSeen(
        completions=len(seen),
        weights=Counter(zip(accuracy[weighted.index].round(3), weighted.round(3), strict=True)),
        mean_weight=weighted.mean(),
        # Tokens to two digits, so that many thousand completions are some hundred points.
        multipliers=Counter(
            zip((float(f"{x:.2g}") for x in excess[multiplied.index].round()), multiplied.round(5), strict=True)
        ),
        amplified=len(amplified),
        mean_multiplier=amplified.mean(),
    )


# The curves are drawn through the formulas of apo.py; torch is loaded only where there is something to draw.


def dads_curve(shape: str) -> Points:
    import torch

    from apo_lora.apo import DADS_SHAPES

    accuracies = torch.linspace(0, 1, 51)
    return list(zip(accuracies.tolist(), DADS_SHAPES[shape](accuracies).tolist(), strict=True))


def stcr_curve(base: float, shortest: float, longest: float) -> Points:
    """From `shortest` to `longest` tokens above the mean length of the group's right completions."""
    import torch

    from apo_lora.apo import stcr_multipliers

    # One group: a right completion without length, so that the others' lengths are their excess.
    excesses = torch.linspace(shortest, longest, 101, dtype=torch.float64)
    lengths, correct = torch.cat([torch.zeros(1), excesses]), torch.tensor([1.0] + [0.0] * 101)
    return list(zip(excesses.tolist(), stcr_multipliers(correct, lengths, base)[1:].tolist(), strict=True))
