"""Kinds of answers that other people's models and data sets write: each kind with right and wrong ones."""

import json
from collections import Counter
from pathlib import Path

import pytest
from answer_kinds import KINDS

from apo_lora.rewards.answers.same import Rules
from apo_lora.rewards.check import gold_in_other_formats, wrong_answer
from apo_lora.rewards.scores import accuracy_reward, gold_is_parsable

SHARED = Path(__file__).parents[3] / "shared" / "data" / "verifier_cases" / "cases.jsonl"
# Measures that the verifier has no rule for.
OTHER_MEASURES = ("absent: relaxed", "absent: tolerance", "absent: IoU", "absent: ANLS")
CONVERTS = Rules(convert_units=True)


def completion(answer: str) -> str:
    return answer[1:] if answer.startswith("!") else f"<think>so</think><answer>{answer}</answer>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_told_right_from_wrong(kind):
    got = {(a, gold): accuracy_reward(completion(a), gold, choices) for a, gold, choices, _ in KINDS[kind]}
    assert {key: got[key] for key in got} == {(a, gold): float(right) for a, gold, _, right in KINDS[kind]}


def test_nearly_every_kind_has_right_and_wrong_answers():
    one_sided = [kind for kind, rows in KINDS.items() if len({right for *_, right in rows}) == 1]
    assert one_sided == []


@pytest.mark.parametrize("kind", KINDS)
def test_gold_of_every_kind_can_be_judged(kind):
    assert [gold for _, gold, choices, _ in KINDS[kind] if not gold_is_parsable(gold, choices)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_gold_of_every_kind_earns_one_in_every_format_and_a_wrong_answer_nothing(kind):
    for gold, choices in {gold: choices for _, gold, choices, _ in KINDS[kind]}.items():
        missed = [c for c in gold_in_other_formats(gold, choices) if accuracy_reward(c, gold, choices) != 1]
        assert (gold, missed) == (gold, [])
        assert accuracy_reward(wrong_answer(gold, choices), gold, choices) == 0


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
    assert accuracy_reward(completion(answer), gold) == 0
    assert accuracy_reward(completion(answer), gold, rules=CONVERTS) == right


@pytest.mark.parametrize("answer", ["9 + 6", "5 \\times 3", "45 \\div 3", "x = 9 + 6", "(9+6)"])
def test_arithmetic_counts_as_a_whole_number_only_where_the_recipe_says_so(answer):
    assert accuracy_reward(completion(answer), "15") == 0
    assert accuracy_reward(completion(answer), "15", rules=Rules(accept_unevaluated=True)) == 1
    assert accuracy_reward(completion(answer), "16", rules=Rules(accept_unevaluated=True)) == 0


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
