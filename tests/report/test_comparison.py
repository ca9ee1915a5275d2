"""What several seeds say, by hand: means, differences by seed, intervals; in words and as the sweep's picture."""

import io

import pytest
from PIL import Image, ImageChops
from report_runs import held_out, write_run

from apo_lora.report.comparison import (
    COMPARED,
    compare,
    difference_by_seed,
    difference_rows,
    format_estimate,
    mean_over_seeds,
    mean_rows,
    t_quantile,
    value,
)
from apo_lora.report.runs import read_run
from apo_lora.run.files import write_json
from apo_lora.sweep.findings import picture


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
    assert (estimate["mean"], estimate["n"]) == (3, 5)
    assert estimate["high"] - 3 == pytest.approx(1.96324, abs=1e-5) == 3 - estimate["low"]
    assert estimate["excludes_zero"] and not mean_over_seeds([-2, -1, 0, 1, 3])["excludes_zero"]


def test_one_value_has_no_interval_and_none_has_nothing():
    assert mean_over_seeds([4.0])["low"] is None and not mean_over_seeds([4.0])["excludes_zero"]
    assert mean_over_seeds([]) is None


def test_differences_are_taken_within_a_seed():
    grpo, apo = {0: 0.1, 1: 0.5, 2: 0.9}, {0: 0.2, 1: 0.61, 2: 0.99}
    paired = difference_by_seed(apo, grpo)
    # differences 0.10, 0.11, 0.09: mean 0.1, deviation 0.01, half width 4.30265 * 0.01 / sqrt(3)
    assert paired["mean"] == pytest.approx(0.1) and paired["high"] - paired["mean"] == pytest.approx(
        0.0248414, abs=1e-6
    )
    assert paired["excludes_zero"]
    shuffled = difference_by_seed({0: 0.99, 1: 0.2, 2: 0.61}, grpo)  # the same values, without their pairs
    assert shuffled["mean"] == pytest.approx(0.1) and not shuffled["excludes_zero"]


def test_a_seed_without_a_value_is_left_out_of_both():
    assert difference_by_seed({0: 1.0, 1: None, 2: 5.0}, {0: 0.0, 1: 3.0})["n"] == 1


@pytest.fixture
def make_run(tmp_path):
    """make_run(method, seed, accuracy after training, **metrics of every step) -> Run."""

    def made(method, seed, accuracy, **metrics):
        folder = write_run(tmp_path / f"{method}-{seed}", f"train.seed={seed}", steps=6, metrics=metrics)
        tasks = {"before": {"reasoning": held_out(0.5)}, "after": {"reasoning": held_out(accuracy)}}
        write_json(folder / "eval.json", tasks)
        return read_run(folder)

    return made


def test_figures_come_from_held_out_items_and_from_the_last_steps(make_run):
    run = make_run("a", 0, 0.8, entropy=None)
    after = {compared.key: value(run, compared, "after", final_steps=2) for compared in COMPARED}
    assert after == {
        "accuracy": 0.8, "length_wrong": 60.0, "entropy": None, "general_accuracy": None, "kl": pytest.approx(0.055)
    }  # fmt: skip
    before = {compared.key: value(run, compared, "before", final_steps=2) for compared in COMPARED}
    assert before["accuracy"] == 0.5 and before["kl"] == pytest.approx(0.01)


def test_all_groups_are_compared_with_the_first(make_run):
    grpo = [make_run("grpo", seed, accuracy) for seed, accuracy in ((0, 0.6), (1, 0.7), (2, 0.8))]
    apo = [make_run("apo", seed, accuracy) for seed, accuracy in ((1, 0.81), (2, 0.89))]
    figures = compare({"GRPO": grpo, "APO": apo, "none": []}, final_steps=2)
    accuracy = figures["accuracy"]
    assert accuracy["variants"]["GRPO"]["mean"] == pytest.approx(0.7) and accuracy["variants"]["none"] is None
    assert accuracy["variants"]["APO"]["by_seed"] == {1: 0.81, 2: 0.89} and accuracy["before"]["n"] == 3
    assert accuracy["differences"].keys() == {"APO", "none"} and accuracy["differences"]["none"] is None
    assert accuracy["differences"]["APO"]["mean"] == pytest.approx(0.1)  # 0.11 and 0.09
    assert accuracy["differences"]["APO"]["n"] == 2

    means, differences = mean_rows(figures), difference_rows(figures, "GRPO")
    assert [row[0] for row in means] == ["", "before", "GRPO", "APO", "none"]
    assert means[0][1] == "Reasoning accuracy" and means[2][1] == "0.700 (0.452 to 0.948)"
    assert [row[0] for row in differences] == ["minus GRPO", "APO", "none"]
    assert differences[1][1] == "+0.100 (-0.027 to +0.227)" and set(differences[2][1:]) == {"-"}


def test_a_star_marks_a_difference_whose_interval_excludes_zero(make_run):
    grpo = [make_run("grpo", seed, 0.6 + seed / 100) for seed in (0, 1)]
    stars = [
        difference_rows(
            compare({"GRPO": grpo, "APO": [make_run(name, seed, accuracy[seed]) for seed in (0, 1)]}, 2), "GRPO"
        )[1][1]
        for name, accuracy in (("a", (0.8, 0.81)), ("b", (0.8, 0.6)))
    ]
    assert ["*" in star for star in stars] == [True, False]


def test_an_estimate_is_written_as_its_figure_is():
    estimate = {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert format_estimate(estimate, "accuracy", "+") == "+0.500 (+0.250 to +0.750)"
    assert format_estimate({**estimate, "low": None}, "length_wrong") == "0.5"
    assert format_estimate(None, "accuracy") == "-"


def test_the_picture_shows_what_was_found(make_run):
    pictures = []
    for name, shift in (("one", 0.0), ("other", 3.0)):
        groups = {
            "GRPO": [make_run(f"grpo-{name}", seed, 0.6 + seed / 10) for seed in (0, 1)],
            "APO": [make_run(f"apo-{name}", seed, 0.6, kl=shift) for seed in (0, 1)],
            "none": [],
        }
        content = picture(groups, compare(groups, 2))
        pictures.append(Image.open(io.BytesIO(content)).convert("L"))
        assert len(content) < 300_000
    assert ImageChops.difference(*pictures).getbbox()  # one variant's KL has moved
