"""What several seeds say: means, differences by seed, and their 95 % t intervals. Numbers in, numbers out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import mpmath


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with the 95 % interval of Student's t; one value has a mean and no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)


@cache
def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """The t that a Student's t variable stays within (either side) with this probability."""

    def inside(t: float) -> float:
        # P(|T| < t), through the incomplete beta function (Abramowitz and Stegun 26.7.1).
        return mpmath.betainc(0.5, degrees / 2, 0, t * t / (degrees + t * t), regularized=True)

    # The upper end holds for one degree of freedom, whose tails are the heaviest: t = tan(pi c / 2) < 2 / (1 - c).
    ends = (0, 2 / (1 - confidence))
    return float(mpmath.findroot(lambda t: inside(t) - confidence, ends, solver="illinois", tol=1e-20))


def mean_over_seeds(values: Sequence[float]) -> Estimate | None:
    """None for no values."""
    n = len(values)
    if n == 0:
        return None
    mean = sum(values) / n
    if n == 1:
        return Estimate(mean, None, None, 1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def difference_by_seed(values: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Estimate | None:
    """`values` minus `baseline`, seed by seed, over the seeds that have both: what a seed does to both falls out."""
    seeds = [s for s in values if values[s] is not None and baseline.get(s) is not None]
    return mean_over_seeds([values[seed] - baseline[seed] for seed in seeds])


ByVariant = Mapping[str, Mapping[int, float | None]]
"""Variant to seed to value."""


def compare(values: ByVariant, baseline: str) -> tuple[dict[str, Estimate | None], dict[str, Estimate | None]]:
    """One figure over all variants: the mean of each, and the difference of each other one to `baseline`."""
    means = {
        variant: mean_over_seeds([value for value in by_seed.values() if value is not None])
        for variant, by_seed in values.items()
    }
    differences = {
        variant: difference_by_seed(by_seed, values[baseline])
        for variant, by_seed in values.items()
        if variant != baseline
    }
    return means, differences
