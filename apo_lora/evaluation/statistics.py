"""Statistics of held-out items: intervals of proportions and of their differences, a test, pass@k. Numbers in and out.

All intervals are 95 % intervals, and treat the items as a random sample.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959964  # of the normal distribution, two-sided 95 %
BOOTSTRAP_DRAWS = 2000


class Pairs(NamedTuple):
    """The same items, answered by both models."""

    both: int
    """Right by both."""
    only_tuned: int
    only_base: int
    neither: int

    @property
    def items(self) -> int:
        return sum(self)

    @property
    def difference(self) -> float:
        """Accuracy of the tuned model less that of the base."""
        return (self.only_tuned - self.only_base) / self.items


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927): honest near 0 and 1 and for few items, where p +- z s is not."""
    share = successes / total
    centre = (share + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total)) / (1 + Z * Z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(pairs: Pairs) -> tuple[float, float]:
    """Interval of the difference of two proportions on the same items.

    Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10: the Wilson intervals of both, joined through their
    correlation phi, whose numerator is corrected for continuity where it is positive.
    """
    n = pairs.items
    right_tuned, right_base = pairs.both + pairs.only_tuned, pairs.both + pairs.only_base
    tuned, base = right_tuned / n, right_base / n
    tuned_low, tuned_high = wilson_interval(right_tuned, n)
    base_low, base_high = wilson_interval(right_base, n)
    margins = right_tuned * (n - right_tuned) * right_base * (n - right_base)
    association = pairs.both * pairs.neither - pairs.only_tuned * pairs.only_base
    if association > 0:
        association = max(association - n / 2, 0)
    phi = association / math.sqrt(margins) if margins else 0.0

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    low = pairs.difference - distance(tuned - tuned_low, base_high - base)
    high = pairs.difference + distance(tuned_high - tuned, base - base_low)
    return max(-1.0, low), min(1.0, high)


def sign_test(only_one: int, only_other: int) -> float:
    """Exact two-sided p-value of the split among items that exactly one model answers right.

    Under the null hypothesis each such item is a fair coin flip; this is McNemar's exact test.
    """
    n, fewer = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of k completions is right, estimated without bias from `samples` >= k of one item.

    1 - C(n - c, k) / C(n, k); Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Interval of a mean over items: percentiles of the means of resampled items (Efron 1979). One seed, one result."""
    rng, n = random.Random(seed), len(values)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(BOOTSTRAP_DRAWS))
    return means[int(0.025 * BOOTSTRAP_DRAWS)], means[int(0.975 * BOOTSTRAP_DRAWS) - 1]
