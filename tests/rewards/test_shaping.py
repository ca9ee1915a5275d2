"""Penalties of length and repetition, worked by hand; and every reward in the box as training and its check call it."""

import pytest

from apo_lora.recipe.schema import BUILT_IN_REWARDS, RewardsSection
from apo_lora.rewards.check import check_functions
from apo_lora.rewards.functions import reward_functions
from apo_lora.rewards.shaping import overlong_punishment, repetition_penalty
from apo_lora.rewards.verifier import Verifier


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (95, -0.75), (100, -1), (130, -1)]
)
def test_overlong_grows_over_the_last_tokens(length, expected):
    assert overlong_punishment(length, limit=100, cache=20) == pytest.approx(expected)


def test_overlong_may_begin_at_once():
    assert [overlong_punishment(n, limit=4, cache=4) for n in range(5)] == [0, -0.25, -0.5, -0.75, -1]


@pytest.mark.parametrize(
    ("ids", "ngram", "expected"),
    [
        ([1, 2, 3, 4], 2, 0),
        ([5, 5, 5, 5, 5], 2, -3 / 4),  # four pairs, all the same
        ([1, 2, 1, 2, 1], 2, -2 / 4),  # 12 21 12 21
        ([1, 2, 1, 2, 1], 3, -1 / 3),  # 121 212 121
        ([1, 1, 2], 1, -1 / 3),
        ([1, 1], 3, 0),
        ([], 3, 0),
    ],
)
def test_repetition_is_the_share_seen_before(ids, ngram, expected):
    assert repetition_penalty(ids, ngram) == pytest.approx(expected)


def section(*names, **options):
    return RewardsSection(functions=names, **options)


@pytest.fixture(scope="module")
def verifier():
    with Verifier(seconds_per_item=3) as verifier:
        yield verifier


@pytest.mark.parametrize("dress", [str, lambda text: [{"role": "assistant", "content": text}]])
def test_options_of_the_recipe_reach_the_functions(verifier, dress):
    names = ("relaxed", "iou", "overlong", "repetition")
    options = {"relaxed_tolerance": 0.2, "boxes": "thousandths", "overlong_tokens": 4, "repetition_ngram": 1}

    def rewards(**options):
        columns = {
            "prompts": [None] * 3,
            "completions": [dress(f"<answer>{text}</answer>") for text in ("45", "[0, 0, 1200, 10]", "B")],
            "completion_ids": [[1] * 8, [1, 2, 3], [1] * 10],
            "answer": ["50", "[0, 0, 1200, 10]", "5"],
            "choices": [None, None, ["4", "5"]],
        }
        return [function(**columns) for function in reward_functions(section(*names, **options), verifier, 10)]

    assert rewards() == [[0, 1, 1], [0, 1, 0], [0, 0, -1], [pytest.approx(-5 / 6), 0, pytest.approx(-7 / 8)]]
    assert rewards(**options) == [[1, 1, 1], [0, 0, 0], [-0.5, 0, -1], [-7 / 8, 0, -9 / 10]]


ROWS = {
    "accuracy": [("30", None), ("B", ["round", "square"])],
    "relaxed": [("30", None), ("42%", None), ("1.2 million", None), ("0", None), ("red", None), ("B", ["2", "4"])],
    "iou": [("[1, 2, 30, 40]", None), ("[[0, 0, 5, 5], [1.5, 2, 30, 40]]", None), ("(1,2),(30,40)", None)],
}


@pytest.mark.parametrize("name", BUILT_IN_REWARDS)
def test_the_check_of_rewards_knows_each(verifier, name):
    rows = ROWS.get(name, ROWS["accuracy"])
    checks = check_functions(rows, section(name), verifier, 1024)
    assert {check.expected for check in checks} >= {BUILT_IN_REWARDS[name]} and len(checks) > 1
    assert [check for check in checks if check.passed < check.checked] == []
    assert name == "accuracy" or all(check.format.startswith(f"{name}: ") for check in checks)


def test_the_check_finds_gold_that_nothing_can_earn(verifier):
    rows = [("[1, 2, 3, 4]", None), ("[0, 0, 1200, 9]", None), ("a cup", None)]
    for boxes, right in (("pixels", 2), ("thousandths", 1)):
        unchanged = check_functions(rows, section("iou", boxes=boxes), verifier, 1024)[0]
        assert (unchanged.format, unchanged.checked, unchanged.passed) == ("iou: unchanged", 3, right)
        assert unchanged.first_failure == right


def test_own_functions_are_not_called(verifier):
    named = section("accuracy", "nowhere:at_all")
    assert all(":" not in check.format for check in check_functions(ROWS["accuracy"], named, verifier, 1024))
    assert check_functions(ROWS["accuracy"], section("nowhere:at_all"), verifier, 1024)
