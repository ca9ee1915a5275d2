"""Rewards: hand-made verdicts, real model outputs with known verdicts, format, gold, users' own rewards."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from answer_kinds import ONE_TO_FOUR, ROOTS, SHAPES
from hostile_cases import HOSTILE

from apo_lora.errors import RewardError
from apo_lora.rewards.check import check_rows
from apo_lora.rewards.plugins import load_reward
from apo_lora.rewards.scores import accuracy_reward, format_reward, gold_is_parsable

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>5</answer>", 0.5),
        ("\n <think>\na\n</think>\n\n<answer>\n5\n</answer> \n", 0.5),
        ("<answer>5</answer>", 0.0),
        ("<think>a</think>5", 0.0),
        ("a</think><answer>5</answer>", 0.0),
        ("x<think>a</think><answer>5</answer>", 0.0),
        ("<think>a</think>so<answer>5</answer>", 0.0),
        ("<think>a</think><answer>5</answer>.", 0.0),
        ("<think>a</think><answer>5", 0.0),
        ("<think>a</think><answer>5</answer><answer>5</answer>", 0.0),
        ("<think></think><answer>5</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think> \n</think><answer>5</answer>", 0.0),
        ("<think>a</think><answer>\n </answer>", 0.0),
        ("<think>a</think><answer><</answer>", 0.5),
        ("<think>a</think><think>b</think><answer>5</answer>", 0.0),
        ("<think>a <answer>5</answer></think>", 0.0),
        ("<answer>5</answer><think>a</think>", 0.0),
        ("<think>a<answer>5</answer></think><answer>5</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_is_strict(completion, expected):
    assert format_reward(completion) == expected


@pytest.mark.parametrize(
    ("gold", "choices", "expected"),
    [
        ("5", None, True),
        ("blue", None, True),
        ("\\frac{1}{2}", None, True),
        ("∞", None, True),
        ("The midpoints form a hexagon", None, True),
        ("D", SHAPES, True),
        ("(d)", SHAPES, True),
        ("circle", SHAPES, True),
        ("4.0", ONE_TO_FOUR, True),
        ("\\sqrt{75}", ROOTS, True),
        ("E", SHAPES, False),
        ("oval", SHAPES, False),
        ("", None, False),
        (" \n", None, False),
        ("?!.", None, False),
        ("$", None, False),
        ("\\frac{1}{", None, False),
        ("9" * 2000, None, False),
        (None, None, False),
    ],
)
def test_gold_is_parsable(gold, choices, expected):
    assert gold_is_parsable(gold, choices) is expected


def test_unparsable_gold_earns_nothing():
    assert accuracy_reward("<answer></answer>", "") == 0.0
    assert accuracy_reward("<answer>E</answer>", "E", SHAPES) == 0.0


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_earn_nothing_quickly_even_without_a_sandbox(name):
    started = time.monotonic()
    for wrap in ("<think>a</think><answer>%s</answer>", "\\boxed{%s}", "%s"):
        for gold, choices in (("5", None), ("\\frac{x+1}{2}", None), ("B", ["\\sqrt{2}", "x+1"]), ("(1,2)", None)):
            assert accuracy_reward(wrap.replace("%s", HOSTILE[name]), gold, choices) == 0.0
    assert time.monotonic() - started < 8


def test_accuracy_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(accuracy_reward("\\boxed{1+2x}", "2x+1")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_neither_the_rewards_nor_a_worker_import_torch():
    code = (
        "import sys, apo_lora.rewards; print(sorted({'torch', 'sympy'} & set(sys.modules)))\n"
        "import apo_lora.rewards.verifier as v; v.math_equal('x+1', '1+x')\n"
        "print(sorted({'torch', 'sympy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ran.stdout == "[]\n['sympy']\n"


# --- recorded verdicts ---

# Recorded as wrong, yet the gold choice's own letter or value in another format, which the table above asks for:
# "1m" for "1 m", "54^\circ" for "54^{\circ}", "12" for "12 cm^2", "(D) <text of D>" for D, "(C) 49" for C.
LABELLED_WRONG_BUT_RIGHT = {
    "mathv-out-ChatGPT3.5_CoT_Text_Image_Caption_-969",
    "mathv-out-ChatGPT3.5_CoT_Text_Image_Caption_-1800",
    "mathv-out-ChatGPT3.5_CoT_Text_Image_Caption_-1529",
    "mathv-out-GPT4_CoT_Text_Only_-2139",
    "mathv-out-Qwen_VL_Max_CoT-650",
}
# Settings of Math-Verify that accuracy_reward has no word for.
FOREIGN_SETTINGS = {"precision", "strict", "allow_set_relation_comp"}


def recorded(group):
    path = DATA / "verdicts" / "verdicts.jsonl"
    if not path.exists():
        print(f"skipped: {path} is absent")
        pytest.skip(f"{path} is absent")
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["group"] == group]


def disagreements(rows):
    """(false accepts, false rejects) as lists of ids."""
    got = [accuracy_reward(row["response"], row["gold"], row["choices"] or None) for row in rows]
    wrong = [row for row, reward in zip(rows, got, strict=True) if reward != row["expected"]]
    return [r["id"] for r in wrong if not r["expected"]], [r["id"] for r in wrong if r["expected"]]


def test_verdicts_on_real_model_outputs():
    rows = recorded("mathv_model_outputs")
    accepts, rejects = disagreements(rows)
    assert len(accepts + rejects) <= 0.03 * len(rows)
    assert set(accepts) <= LABELLED_WRONG_BUT_RIGHT
    assert not rejects


@pytest.mark.slow
def test_verdicts_on_the_cases_of_math_verify():
    rows = [row for row in recorded("math_verify_tests") if not FOREIGN_SETTINGS & row["test_config"].keys()]
    accepts, rejects = disagreements(rows)
    assert not accepts
    assert len(rejects) <= 0.10 * len(rows), rejects


# --- check-rewards ---


def plain_score(completions, answers, choices):
    return [accuracy_reward(*row) for row in zip(completions, answers, choices, strict=True)]


@pytest.mark.parametrize("name", ["puzzlevqa", "geometry3k_examples"])
@pytest.mark.parametrize("with_choices", [True, False])
def test_every_row_of_the_data_passes_the_check(name, with_choices):
    path = DATA / name / "data.jsonl"
    if not path.exists():
        print(f"skipped: {path} is absent")
        pytest.skip(f"{path} is absent")
    data = [json.loads(line) for line in path.read_text().splitlines()]
    if with_choices:
        rows = {(row["answer"], tuple(row["choices"])) for row in data}
    else:
        rows = {(row.get("answer_value", row["answer"]), None) for row in data}
    table = check_rows(sorted(rows), plain_score)
    assert [row for row in table if row.passed != row.checked] == []
    assert {row.expected for row in table} == {0.0, 1.0}


def test_check_rows_notices_a_reward_that_is_wrong():
    def string_compare(completions, answers, choices):
        return [1.0 if c.endswith(f"<answer>{a}</answer>") else 0.0 for c, a in zip(completions, answers, strict=True)]

    failed = [row for row in check_rows([("30", None), ("B", SHAPES)], string_compare) if row.passed < row.checked]
    assert {"bold", "number with .0", "(letter)"} <= {row.format for row in failed}
    generous = check_rows([("30", None)], lambda completions, *_: [1.0] * len(completions))
    assert [(r.format, r.first_failure) for r in generous if r.first_failure is not None] == [
        ("a wrong answer", 0),
        ("an empty answer", 0),
        ("an empty completion", 0),
    ]


# --- users' own rewards ---


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mine.py", "module:function"),
        ("{dir}/mine.py:shrt", "did you mean 'short'"),
        ("{dir}/mnie.py:short", "did you mean 'mine.py'"),
        ("{dir}/mine.py:LIMIT", "must be a function, not int"),
        ("{dir}/mine.py:narrow", "add **columns"),
        ("{dir}/broken.py:f", "SyntaxError"),
        ("{dir}/raises.py:f", "could not be imported: ZeroDivisionError"),
        ("no_such_module_here:f", "no module named 'no_such_module_here'"),
        ("json:lods", "did you mean 'load"),
    ],
)
def test_every_failure_to_load_is_one_line_with_a_remedy(tmp_path, spec, says):
    (tmp_path / "mine.py").write_text(
        "LIMIT = 3\n"
        "def short(prompts, completions, **columns): return []\n"
        "def narrow(prompts, completions): return []\n"
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    spec = spec.replace("{dir}", str(tmp_path))
    with pytest.raises(RewardError) as caught:
        load_reward(spec)
    assert says in str(caught.value)
    assert repr(spec) in str(caught.value)
    assert "\n" not in str(caught.value)
