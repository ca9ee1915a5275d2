"""Intervals, tests and pass@k: against published tables, hand counts and simulation."""

import itertools
import random

import pytest

from apo_lora.evaluation.statistics import (
    Pairs,
    bootstrap_interval,
    paired_interval,
    pass_at_k,
    sign_test,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # worked from Wilson's formula with z = 1.96
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval(right, total, low, high):
    assert wilson_interval(right, total) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


# Newcombe 1998, Statistics in Medicine 17, 2635-2650, table III: both, only one, only the other, neither; method 10.
# Left out: (1, 97, 1, 1), whose printed lower limit, 0.8736, is 0.8737 by the formula.
TABLE_III = [
    (36, 12, 2, 0, 0.0569, 0.3404), (20, 12, 2, 16, 0.0562, 0.3292), (18, 12, 2, 18, 0.0562, 0.3290),
    (36, 14, 0, 0, 0.1528, 0.4167), (35, 14, 0, 1, 0.1461, 0.4175), (18, 14, 0, 18, 0.1441, 0.3963),
    (2, 97, 1, 0, 0.8721, 0.9854), (0, 29, 1, 0, 0.6666, 0.9882), (2, 98, 0, 0, 0.9178, 0.9945),
    (1, 98, 0, 1, 0.9171, 0.9916), (0, 30, 0, 0, 0.8395, 1.0), (54, 0, 0, 0, -0.0664, 0.0664),
    (53, 0, 0, 1, -0.0729, 0.0729), (30, 0, 0, 24, -0.0358, 0.0358), (29, 0, 0, 25, -0.0354, 0.0354),
    (28, 0, 0, 26, -0.0352, 0.0352), (27, 0, 0, 27, -0.0351, 0.0351),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE_III)
def test_paired_interval_is_newcombes(row):
    low, high = paired_interval(Pairs(*row[:4]))
    assert (low, high) == (pytest.approx(row[4], abs=6e-5), pytest.approx(row[5], abs=6e-5))


def test_paired_interval_changes_sides_with_the_models():
    one, other = paired_interval(Pairs(20, 12, 2, 16)), paired_interval(Pairs(20, 2, 12, 16))
    assert one == pytest.approx((-other[1], -other[0]))


def test_paired_interval_covers_the_truth():
    """100 items that are right together more often than by chance: 95 in 100 intervals should hold the difference."""
    rng, shares = random.Random(0), (0.4, 0.2, 0.1, 0.3)
    held = 0
    for _ in range(1000):
        drawn = rng.choices(range(4), weights=shares, k=100)
        low, high = paired_interval(Pairs(*(drawn.count(cell) for cell in range(4))))
        held += low <= shares[1] - shares[2] <= high
    assert 0.93 <= held / 1000 <= 0.98


def test_sign_test_counts_coins():
    def by_hand(only_one, only_other):
        n, uneven = only_one + only_other, abs(only_one - only_other)
        tosses = list(itertools.product((1, -1), repeat=n))
        return sum(abs(sum(toss)) >= uneven for toss in tosses) / len(tosses)

    for counts in [(0, 0), (1, 0), (5, 0), (6, 1), (3, 3), (2, 7), (4, 3)]:
        assert sign_test(*counts) == pytest.approx(by_hand(*counts)), counts
    assert sign_test(6, 0) == pytest.approx(2 / 64) and sign_test(60, 10) < 1e-8


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n, right, k in [(4, 1, 2), (5, 2, 3), (6, 0, 4), (6, 6, 1), (6, 4, 3)]:
        draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))
    assert pass_at_k(4, 1, 2) != pytest.approx(1 - (1 - 1 / 4) ** 2)  # what the biased estimate would say


def test_bootstrap_interval_is_that_of_the_mean():
    rng = random.Random(1)
    values = [rng.random() for _ in range(200)]
    mean = sum(values) / 200
    half = 1.96 * (sum((value - mean) ** 2 for value in values) / 199 / 200) ** 0.5
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(mean - half, abs=half / 8) and high == pytest.approx(mean + half, abs=half / 8)
    assert bootstrap_interval(values) == (low, high)
