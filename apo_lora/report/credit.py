"""What DADS and STCR did to the completions of a run: weights by accuracy, multipliers by excess length.

The formulas are those of apo.py, here for drawing without torch; a test compares the two.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from apo_lora.report.curves import Points
from apo_lora.report.runs import Row

DADS_FORMULAS: dict[str, Callable[[float], float]] = {
    "complement_exp": lambda accuracy: 1.0 - math.exp(-math.e * accuracy),
    "exp_decay": lambda accuracy: math.exp(-math.e * (1.0 - accuracy)),
    "constant": lambda accuracy: 1.0,
}


def stcr_formula(excess: float, base: float) -> float:
    """`excess`: tokens above the mean length of the group's right completions."""
    return 1.0 - math.expm1(-max(0.0, excess) * math.log(base))


@dataclass
class CreditSeen:
    completions: int = 0
    weights: Counter = field(default_factory=Counter)
    """(group accuracy, KL weight) of completions with a positive advantage, in groups that are partly right."""
    multipliers: Counter = field(default_factory=Counter)
    """(excess tokens, multiplier) of wrong completions in groups that have a right one."""
    amplified: int = 0
    """Completions with a multiplier above 1."""
    multiplier_sum: float = 0.0
    """Over those."""

    @property
    def mean_weight(self) -> float | None:
        total = self.weights.total()
        return sum(weight * count for (_, weight), count in self.weights.items()) / total if total else None

    @property
    def mean_multiplier(self) -> float | None:
        return self.multiplier_sum / self.amplified if self.amplified else None


def credit_seen(groups: Iterable[list[Row]]) -> CreditSeen:
    """Counted from the rows of completions.jsonl, a list per prompt."""
    seen = CreditSeen()
    for group in groups:
        right = [row["length"] for row in group if row["correct"]]
        accuracy = len(right) / len(group)
        seen.completions += len(group)
        for row in group:
            if row["advantage"] > 0 and 0 < accuracy < 1:
                seen.weights[round(accuracy, 3), round(row["kl_weight"], 3)] += 1
            if right and not row["correct"]:
                excess = row["length"] - sum(right) / len(right)
                seen.multipliers[_rounded(excess), round(row["stcr_multiplier"], 5)] += 1
            if row["stcr_multiplier"] > 1:
                seen.amplified += 1
                seen.multiplier_sum += row["stcr_multiplier"]
    return seen


def _rounded(tokens: float) -> float:
    """To two digits, so that many thousand completions are some hundred points."""
    return float(f"{round(tokens):.2g}")


def dads_curve(shape: str) -> Points:
    return [(n / 50, DADS_FORMULAS[shape](n / 50)) for n in range(51)]


def stcr_curve(base: float, shortest: float, longest: float) -> Points:
    excesses = [shortest + (longest - shortest) * n / 100 for n in range(101)]
    return [(excess, stcr_formula(excess, base)) for excess in excesses]
