"""The arithmetic, tables and pictures of `python -m benchmarks.evidence`, on runs made up here."""

import json

import pytest
from conftest import PROJECT
from pandas import DataFrame

from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.report.runs import Run
from apo_lora.run.directory import RunDir
from apo_lora.sweep.experiment import load_experiment, plan_runs
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import pictures
from benchmarks.evidence.figures import EVEN, MIXED, mean_kl_weight, measured, pooled
from benchmarks.evidence.tasks import EASY, GENERAL, HARD, rows


def made_up(path, seed, accuracy, length=40.0):
    """A run whose every accuracy is `accuracy`, from 0.5 before."""

    def task(accuracy):
        one = {"accuracy": accuracy, "length_wrong": length, "length_correct": length - 5, "entropy": 0.2}
        return {"reasoning": one | {"categories": {HARD: one, EASY: one}}, "general": one}

    return Run(
        name=f"seed-{seed}",
        folder=RunDir(path),
        recipe=load_recipe(find_recipe("tiny_cpu"), [f"train.seed={seed}"]),
        environment={},
        steps=DataFrame({"kl": [0.0, 0.1 * accuracy]}, index=[1, 2]),
        evaluation={"before": task(0.5), "after": task(accuracy)},
    )


def groups_of(path, **accuracies):
    return {
        variant.replace("_", "-"): [made_up(path, seed, value) for seed, value in enumerate(values, start=1)]
        for variant, values in accuracies.items()
    }


def test_differences_are_taken_seed_by_seed(tmp_path):
    groups = groups_of(tmp_path, GRPO=(0.6, 0.8), DADS=(0.7, 0.9))
    hard = measured(groups, MIXED, [("DADS", "GRPO")])["hard"]
    assert hard["before"]["mean"] == 0.5
    assert hard["variants"]["GRPO"]["by_seed"] == {1: 0.6, 2: 0.8}
    difference = hard["differences"]["DADS minus GRPO"]
    # Each seed gains exactly 0.1, so the interval has no width though the seeds lie far apart.
    assert difference["mean"] == pytest.approx(0.1) and difference["low"] == pytest.approx(0.1)
    assert difference["excludes_zero"] and hard["variants"]["GRPO"]["high"] > 1


def test_pooled_differences_are_means_over_betas_of_one_seed(tmp_path):
    groups = groups_of(tmp_path, A_1=(0.5, 0.6), B_1=(0.4, 0.6), A_2=(0.9, 0.7), B_2=(0.6, 0.5))
    pairs = [("A-1", "B-1"), ("A-2", "B-2")]
    found = pooled(measured(groups, MIXED, pairs), pairs)["general"]
    # seed 1: (0.1 + 0.3) / 2, seed 2: (0.0 + 0.2) / 2
    assert found["mean"] == pytest.approx(0.15) and found["n"] == 2
    assert found["high"] - found["mean"] == pytest.approx(12.7062 * 0.05, rel=1e-4)


def test_the_mean_weight_is_of_all_completions(tmp_path):
    run = made_up(tmp_path, 1, 0.5)
    run.folder.completions.write_text("".join(json.dumps({"kl_weight": w}) + "\n" for w in (1.0, 0.3, 0.5)))
    assert mean_kl_weight([run]) == pytest.approx(0.6)


def test_a_smaller_beta_is_an_experiment_of_its_own(tmp_path):
    path = evidence._with_mean_weights(tmp_path / "dads_mean.yaml", {0.01: 0.8, 0.64: 0.5})
    planned = plan_runs(path, load_experiment(path), tmp_path, ["data.train=boards"])
    betas = {run.variant: run.recipe.grpo.beta for run in planned}
    assert betas == {"mean-0.01": pytest.approx(0.008), "mean-0.64": pytest.approx(0.32)}
    assert all(run.recipe.apo.dads is None and run.recipe.apo.stcr is None for run in planned)


@pytest.mark.parametrize("name", ["stcr", "dads", "released_even", "released_mixed"])
def test_every_experiment_is_valid_and_keeps_to_seeds_that_chose_nothing(name, tmp_path):
    path = evidence.HERE / f"{name}.yaml"
    experiment = load_experiment(path)
    planned = plan_runs(path, experiment, tmp_path, ["data.train=boards", "data.eval=boards"])
    assert {run.seed for run in planned} == {1, 2, 3, 4, 5} and len(planned) == 5 * len(experiment.variants)
    if name == "dads":
        betas = {run.variant.partition("-")[2]: run.recipe.grpo.beta for run in planned}
        assert {float(name): value for name, value in betas.items()} == {b: b for b in (0, *evidence.BETAS)}


def test_hard_questions_tell_a_sum_from_a_difference():
    asked = list(rows((EASY, HARD), "test", 60)) + list(rows((GENERAL,), "test", 30))
    assert [row["category"] for row in asked[:4]] == [EASY, HARD, EASY, HARD]
    assert "more" in asked[1]["problem"] and "plus" in asked[-1]["problem"]
    assert [row["problem"] for row in rows((EASY, HARD), "test", 60)] == [row["problem"] for row in asked[:60]]
    assert [row["problem"] for row in rows((EASY, HARD), "train", 60)] != [row["problem"] for row in asked[:60]]


def test_tables_mark_what_excludes_zero(tmp_path):
    groups = groups_of(tmp_path, GRPO=(0.6, 0.8), STCR=(0.7, 0.9))
    text = evidence.tables({"figures": measured(groups, EVEN, [("STCR", "GRPO")])}, EVEN)
    assert "| STCR minus GRPO |" in text and "+0.100 (+0.100 to +0.100) *" in text
    assert "| before |" in text and "Length of right answers" in text


def test_pictures_are_drawn(tmp_path):
    accuracies = {f"{name}_{beta:g}": (0.5, 0.6) for name in ("GRPO", "DADS", "mean") for beta in (0, *evidence.BETAS)}
    found = measured(groups_of(tmp_path, **accuracies), MIXED, [])
    series = {name: [(b, f"{name}-{b:g}") for b in (0, *evidence.BETAS)] for name in ("GRPO", "DADS", "mean")}
    assert pictures.frontier(found, series, "caption").startswith(b"\x89PNG")
    assert pictures.ends(found, ("hard", "entropy"), "caption").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "figures"), [("stcr", EVEN), ("dads", MIXED), ("released_even", EVEN), ("released_mixed", MIXED)]
)
def test_the_page_has_the_tables_that_were_measured(name, figures):
    found = json.loads((evidence.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    page = (PROJECT / "docs" / "experiments" / "results.md").read_text(encoding="utf-8")
    for table in evidence.tables(found, figures).strip().split("\n\n"):
        assert table in page
