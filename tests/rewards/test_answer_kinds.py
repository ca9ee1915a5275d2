"""Kinds of answers that models and data sets write: of each gold answer, what is right and what is wrong."""

import json
from collections import Counter
from pathlib import Path

import pytest
from answer_kinds import KINDS

from apo_lora.rewards.answers.match import MathQuestion
from apo_lora.rewards.answers.same import Rules
from apo_lora.rewards.check import accuracy_tries
from apo_lora.rewards.scores import accuracy_reward, gold_is_parsable, quick_verdict

SHARED = Path(__file__).parents[3] / "shared" / "data" / "verifier_cases" / "cases.jsonl"
# Measures that the verifier has no rule for.
OTHER_MEASURES = ("absent: relaxed", "absent: tolerance", "absent: IoU", "absent: ANLS")
CONVERTS = Rules(convert_units=True)


def misjudged(gold, completions):
    return [(gold, text) for text, reward in completions if accuracy_reward(text, gold.gold, gold.choices) != reward]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_told_right_from_wrong(kind):
    assert [miss for gold in KINDS[kind] for miss in misjudged(gold, gold.completions())] == []


def test_every_kind_has_right_and_wrong_answers():
    assert all(any(gold.right for gold in golds) and any(gold.wrong for gold in golds) for golds in KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_gold_of_every_kind_earns_one_in_every_format_and_a_wrong_answer_nothing(kind):
    for gold in KINDS[kind]:
        assert gold_is_parsable(gold.gold, gold.choices)
        tries = accuracy_tries(gold.gold, gold.choices)
        assert misjudged(gold, ((text, reward) for _, reward, text in tries)) == []


def test_most_verdicts_need_no_mathematics():
    cases = [
        (text, gold.gold, gold.choices) for golds in KINDS.values() for gold in golds for text, _ in gold.completions()
    ]
    asked = [case for case in cases if isinstance(quick_verdict(*case), MathQuestion)]
    assert 0 < len(asked) < 0.3 * len(cases)


def in_tags(answer):
    return f"<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("250 cm", "2.5 m", 1),
        ("2.5 m", "250 cm", 1),
        ("250 cm", "25 m", 0),
        ("7200 s", "2 hours", 1),
        ("45 min", "0.75 h", 1),
        ("20 m/s", "72 km/h", 1),
        ("20 m/s", "20 km/h", 0),
        ("3000 g", "3 kg", 1),
        ("3000 g", "3 km", 0),
        ("2 m^2", "20000 cm^2", 1),
        ("2 m^2", "200 cm^2", 0),
        ("2米", "200厘米", 1),
        ("45°", "\\frac{\\pi}{4}", 1),
        ("\\frac{\\pi}{4}", "45°", 1),
        ("\\frac{\\pi}{4}", "60°", 0),
        ("20 °C", "68 °F", 0),
    ],
)
def test_units_are_converted_only_where_the_recipe_says_so(answer, gold, right):
    assert accuracy_reward(in_tags(answer), gold) == 0
    assert accuracy_reward(in_tags(answer), gold, rules=CONVERTS) == right


@pytest.mark.parametrize("answer", ["9 + 6", "5 \\times 3", "45 \\div 3", "x = 9 + 6", "(9+6)"])
def test_arithmetic_counts_as_a_whole_number_only_where_the_recipe_says_so(answer):
    assert accuracy_reward(in_tags(answer), "15") == 0
    assert accuracy_reward(in_tags(answer), "15", rules=Rules(accept_unevaluated=True)) == 1
    assert accuracy_reward(in_tags(answer), "16", rules=Rules(accept_unevaluated=True)) == 0


def test_the_shared_cases():
    if not SHARED.exists():
        print(f"skipped: {SHARED} is absent")
        pytest.skip(f"{SHARED} is absent")
    cases = [json.loads(line) for line in SHARED.read_text(encoding="utf-8").splitlines()]
    wrong = Counter()
    for case in cases:
        rules = CONVERTS if case["kind"] == "absent: conversion" else Rules()
        if not case["kind"].startswith(OTHER_MEASURES):
            got = accuracy_reward(case["completion"], case["gold"], case["choices"], rules)
            wrong[case["kind"]] += got != case["expected"]
    assert +wrong == Counter()
