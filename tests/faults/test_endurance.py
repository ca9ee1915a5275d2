"""A short stretch of the endurance run, with a looser limit, since allocators still fill up. And that it would tell."""

from dataclasses import replace

import pytest

from .endurance import Figures, figures, slope, watch

STEPS = 100
MOST_KB_PER_STEP = 40.0
"""A picture of a prompt takes more, so a step that kept its rollout would show. Over 2,000 steps the limit is 1 KB."""

FLAT = Figures(2000, 0.2, 900.0, 0.1, 0.1, (6, 7), (4, 4), 1280.0, 360.0, (1_400_000, 1_400_000))


def test_the_slope_of_a_line():
    assert slope([(x, 7 + 3 * x) for x in range(5)]) == pytest.approx(3)
    assert slope([(1, 5), (2, 5), (9, 5)]) == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"resident_kb_per_step": 1.0}, "resident memory grows by 1.00 KB"),
        ({"open_files": (6, 11)}, "open files"),
        ({"threads": (4, 9)}, "threads"),
    ],
)
def test_what_grows_is_a_problem(change, word):
    assert FLAT.problems(1.0) == []
    (problem,) = replace(FLAT, **change).problems(1.0)
    assert word in problem


@pytest.mark.slow
def test_a_short_stretch_is_nearly_flat(tmp_path):
    samples, seconds_per_step = watch(tmp_path, STEPS, show_progress=False)
    found = figures(tmp_path, STEPS, samples, seconds_per_step)
    print(found)
    assert found.problems(MOST_KB_PER_STEP) == []
    assert found.metrics_bytes_per_step < 1500 and found.completions_bytes_per_completion < 500
    first, last = found.checkpoint_bytes
    assert last - first < 120_000  # the figures of the last 50 steps, and no more
