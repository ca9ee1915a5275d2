"""Means over seeds, differences by seed and their intervals, against values worked by hand; and the picture of them."""

import pytest

from apo_lora.sweep.figures import FIGURES, figures_before, figures_of
from apo_lora.sweep.findings import compare, difference_by_seed, mean_over_seeds, t_quantile
from apo_lora.sweep.picture import course
from apo_lora.sweep.tables import difference_rows, estimate_words, markdown


@pytest.mark.parametrize(
    # Two-sided 95 % points of Student's t, from the printed tables.
    ("degrees", "t"),
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (1000, 1.9623)],
)
def test_t_quantiles_are_those_of_the_tables(degrees, t):
    assert t_quantile(degrees) == pytest.approx(t, abs=6e-5)


def test_a_mean_has_students_interval():
    # mean 3, deviation sqrt(10 / 4), half width 2.77645 * sqrt(2.5 / 5)
    estimate = mean_over_seeds([1, 2, 3, 4, 5])
    assert (estimate.mean, estimate.n) == (3, 5)
    assert estimate.high - 3 == pytest.approx(1.96324, abs=1e-5) == 3 - estimate.low
    assert estimate.excludes_zero and not mean_over_seeds([-2, -1, 0, 1, 3]).excludes_zero


def test_one_value_has_no_interval_and_none_has_nothing():
    assert mean_over_seeds([4.0]).low is None and not mean_over_seeds([4.0]).excludes_zero
    assert mean_over_seeds([]) is None


def test_differences_are_taken_within_a_seed():
    grpo, apo = {0: 0.1, 1: 0.5, 2: 0.9}, {0: 0.2, 1: 0.61, 2: 0.99}
    paired = difference_by_seed(apo, grpo)
    # differences 0.10, 0.11, 0.09: mean 0.1, deviation 0.01, half width 4.30265 * 0.01 / sqrt(3)
    assert paired.mean == pytest.approx(0.1) and paired.high - paired.mean == pytest.approx(0.0248414, abs=1e-6)
    assert paired.excludes_zero
    shuffled = difference_by_seed({0: 0.99, 1: 0.2, 2: 0.61}, grpo)  # the same values, without their pairs
    assert shuffled.mean == pytest.approx(0.1) and not shuffled.excludes_zero


def test_a_seed_without_a_value_is_left_out_of_both():
    assert difference_by_seed({0: 1.0, 1: None, 2: 5.0}, {0: 0.0, 1: 3.0}).n == 1


def test_all_variants_are_compared_with_the_first():
    means, differences = compare({"GRPO": {0: 1.0, 1: 3.0}, "APO": {0: 2.0, 1: 6.0}, "none": {}}, "GRPO")
    assert means["APO"].mean == 4 and means["none"] is None
    assert differences.keys() == {"APO", "none"}
    assert differences["APO"].mean == 2 and differences["none"] is None


def record(shift=0.0):
    task = {"accuracy": 0.8 + shift, "length_wrong": 40.0}
    start = {"accuracy": 0.5, "length_wrong": 66.0}
    rows = [{"step": s, "accuracy": 0.5, "length_wrong": None, "entropy": s / 10, "kl": s + shift} for s in range(1, 7)]
    return {"before": {"reasoning": start, "general": {"accuracy": 0.93}}, "after": {"reasoning": task}}, rows


def test_figures_come_from_held_out_items_and_from_the_last_steps():
    found = figures_of(record(), final_steps=2)
    assert found == {
        "accuracy": 0.8, "length_wrong": 40.0, "entropy": pytest.approx(0.55), "general_accuracy": None, "kl": 5.5
    }  # fmt: skip
    before = figures_before(record())
    assert before == {"accuracy": 0.5, "length_wrong": 66.0, "entropy": 0.1, "general_accuracy": 0.93, "kl": 1.0}


def test_the_course_is_a_running_mean_with_the_range_over_runs():
    steps, means, lows, highs = course([record()[1], record(shift=2.0)[1][:5]], "kl")
    assert steps == [1, 2, 3, 4, 5]  # as far as both have come
    assert means == pytest.approx([2, 2.5, 3, 3.5, 4])
    assert lows == pytest.approx([1, 1.5, 2, 2.5, 3]) and highs == pytest.approx([3, 3.5, 4, 4.5, 5])
    assert course([record()[1]], "length_wrong") == ([], [], [], [])


def findings(low, high):
    plain = {"mean": (low + high) / 2, "low": low, "high": high, "n": 2, "excludes_zero": low > 0}
    of_variant = {**plain, "by_seed": {"0": low, "1": high}}
    figure = {"before": plain, "variants": {"GRPO": of_variant, "APO": of_variant}, "differences": {"APO": plain}}
    return {
        "experiment": "trial", "variants": {"GRPO": {}, "APO": {}}, "baseline": "GRPO", "final_steps": 2,
        "figures": {f.key: figure for f in FIGURES},
    }  # fmt: skip


def test_a_star_marks_a_difference_that_leaves_out_zero():
    assert "*" not in markdown(difference_rows(findings(-1.0, 1.0)))
    assert markdown(difference_rows(findings(1.0, 2.0))).count("*") == len(FIGURES)
    assert estimate_words({"mean": 0.5, "low": 0.25, "high": 0.75}, ".2f", signed=True) == "+0.50 (+0.25 to +0.75)"
    assert estimate_words({"mean": 0.5, "low": None, "high": None}, ".2f") == "0.50"
    assert estimate_words(None, ".2f") == "-"


def test_the_picture_shows_what_was_found(tmp_path):
    from PIL import Image, ImageChops

    from apo_lora.sweep.picture import draw

    pictures = []
    for name, shift in (("one.png", 0.0), ("other.png", 3.0)):
        records = {"GRPO": {0: record(), 1: record(1.0)}, "APO": {0: record(shift), 1: record(shift)}}
        draw(records, findings(0.2, 0.4), tmp_path / name)
        pictures.append(Image.open(tmp_path / name).convert("L"))
    assert ImageChops.difference(*pictures).getbbox()  # one variant's KL has moved
    assert (tmp_path / "one.png").stat().st_size < 300_000
