"""From answers to figures, and to the table: on rows written by hand."""

import re

import pytest

from apo_lora.data.benchmarks import BENCHMARKS
from apo_lora.data.examples import Example
from apo_lora.evaluation.figures import all_figures, compared, passes, passes_compared, powers_up_to, summary
from apo_lora.evaluation.measure import measure
from apo_lora.evaluation.table import table
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.rewards.scores import accuracy_reward
from apo_lora.rollout.sampling import Completion


def row(number, correct, *, model="base", sample=0, title="reasoning", **values):
    return {
        "set": title, "model": model, "row": number, "sample": sample, "greedy": sample == 0, "problem": "How many?",
        "gold": "1", "choices": None, "category": None, "images": [], "text": "<answer>1</answer>", "answer": "1",
        "correct": correct, "length": 10, "truncated": False, "well_formatted": False, "entropy": 0.5, **values,
    }  # fmt: skip


@pytest.mark.parametrize("correct_by", ["accuracy", "relaxed"])
def test_correct_is_what_the_recipes_reward_calls_so(correct_by):
    recipe = load_recipe(
        find_recipe("tiny_cpu"), [f"rewards.functions=[{correct_by}]", f"rewards.correct_by={correct_by}"]
    )

    def answers(policy, batch, recipe, greedy):
        return [Completion("<answer>41</answer>", 3, False) for _ in batch], [0.5 for _ in batch]

    def exact(texts, golds, choices):
        return [accuracy_reward(*one) for one in zip(texts, golds, choices, strict=True)]

    examples = [Example(number, "How many?", gold, None, ()) for number, gold in enumerate(["40", "41", "60"])]
    judged = measure(None, examples, recipe, exact, seed=0, answers=answers)
    assert [completion.correct for completion in judged] == [correct_by == "relaxed", True, False]


def test_summary_counts():
    rows = [
        row(1, True, length=10, entropy=0.1, well_formatted=True, category="b"),
        row(2, True, length=20, entropy=0.3, truncated=True, category="a"),
        row(3, False, length=60, entropy=0.8, truncated=True, category="b"),
        row(4, False, length=20, entropy=0.4, truncated=True),
    ]
    figures = summary(rows)
    assert (figures["items"], figures["accuracy"]) == (4, 0.5) and figures["accuracy_95_low"] < 0.5
    assert (figures["length_correct"], figures["length_wrong"]) == (15, 40)
    assert (figures["truncated"], figures["well_formatted"]) == (0.75, 0.25)
    assert figures["entropy"] == pytest.approx(0.4)
    assert {name: of["accuracy"] for name, of in figures["categories"].items()} == {"a": 1.0, "b": 0.5}
    assert list(figures["categories"]) == ["a", "b"] and figures["categories"]["b"]["items"] == 2
    assert figures["categories"]["b"]["length_wrong"] == 60 and figures["categories"]["a"]["truncated"] == 1


def test_nothing_right_has_no_length():
    figures = summary([row(1, False)])
    assert figures["length_correct"] is None and figures["accuracy"] == 0 and figures["accuracy_95_high"] > 0.5


def test_items_are_paired_by_their_row():
    base = [row(1, True), row(2, False), row(3, False), row(4, False), row(5, True)]
    tuned = [row(n, c, model="tuned") for n, c in ((5, False), (4, True), (3, True), (2, True), (1, True))]
    figures = compared(base, tuned)
    assert {key: figures[key] for key in ("both", "only_tuned", "only_base", "neither", "items")} == {
        "both": 1, "only_tuned": 3, "only_base": 1, "neither": 0, "items": 5,
    }  # fmt: skip
    assert figures["accuracy"] == pytest.approx(0.4) and figures["sign_test_p"] == pytest.approx(10 / 16)
    assert figures["accuracy_95_low"] < 0.4 < figures["accuracy_95_high"]


def test_pass_at_k_of_sampled_answers():
    base = [row(1, s == 1, sample=s) for s in (1, 2, 3)] + [row(2, False, sample=s) for s in (1, 2, 3)]
    tuned = [row(n, s < 3, sample=s, model="tuned") for n in (1, 2) for s in (1, 2, 3)]
    assert powers_up_to(3) == [1, 2, 3] and powers_up_to(8) == [1, 2, 4, 8] and powers_up_to(0) == []
    values = {k: of_k["value"] for k, of_k in passes(base).items()}
    assert values == {"1": pytest.approx(1 / 6), "2": pytest.approx(1 / 3), "3": pytest.approx(1 / 2)}
    change = {k: of_k["value"] for k, of_k in passes_compared(base, tuned).items()}
    assert change == {"1": pytest.approx(2 / 3 - 1 / 6), "2": pytest.approx(1 - 1 / 3), "3": pytest.approx(1 / 2)}
    assert passes([]) == {}


def test_a_model_without_all_answers_is_left_out():
    rows = [row(1, True), row(2, False), row(1, True, model="tuned")]
    assert set(all_figures(rows, {"reasoning": 2})) == {"base"}
    whole = all_figures([*rows, row(2, True, model="tuned")], {"reasoning": 2})
    assert set(whole) == {"base", "tuned", "difference"}
    assert whole["difference"]["reasoning"]["accuracy"] == 0.5


# --- the table -------------------------------------------------------------------------------------------------------


def figures_of(answers, titles, **about):
    items = {title: len({r["row"] for r in answers if r["set"] == title}) for title in titles}
    sets = {
        title: {"source": title, "rows": count, "items": count, "limit": None, "dropped": {}} | about
        for title, count in items.items()
    }
    return {"sets": sets} | all_figures(answers, items)


def test_table_of_two_models():
    rows = [row(n, n == 1, category=f"kind {n}", sample=s) for n in (1, 2) for s in (0, 1, 2)]
    rows += [row(n, True, model="tuned", category=f"kind {n}", sample=s, length=7) for n in (1, 2) for s in (0, 1, 2)]
    text = "\n".join(table(figures_of(rows, ["reasoning"])))
    assert re.search(r"reasoning +2 +0.500 \(0.09-0.91\) +1.000 \(0.34-1.00\) +\+0.500 \(.*\) +1 / 0 +1$", text, re.M)
    assert re.search(r"reasoning +tuned +7 +- +0.000 +0.000 +0.500", text)
    assert re.search(r"reasoning +2 +0.500 .* 1.000 .* \+0.500", text.split("pass@k")[1])
    assert re.search(r"reasoning: kind 2 +1 +0.000 .* +1.000 .* \+1.000", text) and "paper" not in text


def test_table_of_the_base_alone():
    text = "\n".join(table(figures_of([row(1, True), row(2, False)], ["reasoning"])))
    assert "0.500 (0.09-0.91)" in text and "tuned" not in text and "difference" not in text


def test_the_papers_table_stands_over_the_measured_row():
    rows = [row(n, n < 3, title="mathvista", model=m) for n in range(1, 5) for m in ("base", "tuned")]
    lines = table(figures_of(rows, ["mathvista"], rows=5, limit=5, dropped={"several answers": 1}))
    head = next(i for i, line in enumerate(lines) if line.startswith("accuracy in %"))
    assert lines[head].split()[3:] == ["MathVista", "MathVerse", "MMK12", "MMStar", "MMMU"]
    assert lines[head + 1].split()[2:] == ["57.8", "34.7", "43.5", "54.1", "47.6"]
    assert lines[head + 2].split()[2:] == ["66.2", "41.6", "47.0", "61.3", "48.9"]
    assert re.search(r"here: base +50.0 \(15.0 to 85.0\) +- +- +- +-$", lines[head + 3])
    assert re.search(r"here: difference +\+0.0 \(", lines[head + 5])
    words = "\n".join(lines[head + 6 :])
    assert "only the first 5 rows" in words and "1 of 5 rows dropped (1 several answers)" in words
    assert [b.paper for b in BENCHMARKS.values()][0] == (57.8, 66.2)
