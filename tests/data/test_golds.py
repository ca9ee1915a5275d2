"""Which choice a gold answer names: decided for a data set as a whole, and refused where that leaves two answers."""

import pytest
from data_sets import load, section, write_jsonl

from apo_lora.data.choices import read_choices
from apo_lora.data.golds import gold_items, resolve
from apo_lora.data.text import BadRow
from apo_lora.errors import DataError

THREE = ["kite", "drum", "lamp"]


def golds(tmp_path, *rows, **recipe) -> list:
    """The answer of each (gold, choices); a reason in its place for a row that was dropped."""
    rows = [{"problem": "Which?", "answer": gold, "choices": choices} for gold, choices in rows]
    loaded = load(write_jsonl(tmp_path / "data.jsonl", rows), data=section(**recipe))
    found = {example.row: example.answer for example in loaded.examples}
    found |= {number: reason for reason, bad in loaded.dropped.items() for number, _ in bad}
    return [found[number] for number in sorted(found)]


@pytest.mark.parametrize("kind", [int, float, str, lambda n: f"({n})"])
def test_positions_count_from_0_or_from_1(kind, tmp_path):
    from_0 = [(kind(n), THREE) for n in (0, 2, 1)]
    from_1 = [(kind(n), THREE) for n in (1, 3, 2)]
    assert golds(tmp_path, *from_0) == golds(tmp_path, *from_1) == ["A", "C", "B"]


def test_positions_among_numbers(tmp_path):
    rows = [(0, THREE), (1, ["1", "2", "3"]), (2, ["3", "2", "1"]), (1, ["5", "4"])]
    assert golds(tmp_path, *rows) == ["A", "B", "C", "B"]


def test_numbers_that_are_texts_stay_texts(tmp_path):
    assert golds(tmp_path, ("30", ["30", "40"]), ("2", ["1", "2"])) == ["30", "2"]
    assert golds(tmp_path, (30, [30, 40]), (1, [2, 1])) == ["30", "1"]
    assert golds(tmp_path, ("30", ["30 cm", "40 cm"]), ("2", ["2 cm", "1 cm"])) == ["A", "A"]
    assert golds(tmp_path, ("[1, 2]", ["[1,2]", "[1, 3]"]), ("7", ["7 cm", "7 m"])) == ["[1, 2]", "7"]


@pytest.mark.parametrize(
    ("row", "ways"),
    [
        ((1, THREE), "from_0, from_1"),
        ((1, ["3", "2", "1"]), "text, from_0, from_1"),
        (("A", ["B", "C", "A"]), "text, letter"),
    ],
)
def test_what_could_be_several_choices_is_refused_until_the_recipe_says(row, ways, tmp_path):
    with pytest.raises(DataError, match=rf"several ways \({ways}\).*row 1: .*set data.answer_as") as caught:
        golds(tmp_path, row)
    assert len(caught.value.problems) == 1
    answers = {way: golds(tmp_path, row, answer_as=way)[0] for way in ways.split(", ")}
    assert len(set(answers.values())) > 1


def test_both_bases_in_one_data_set_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"\(from_0, from_1\)"):
        golds(tmp_path, (0, THREE), (3, THREE), (1, THREE), (0, THREE), (3, THREE))


def test_a_few_errors_do_not_change_the_reading(tmp_path):
    rows = [(n % 3, THREE) for n in range(60)]
    assert golds(tmp_path, *rows, (3, THREE), (-1, THREE))[-3:] == ["C", "unparsable gold", "unparsable gold"]


@pytest.mark.parametrize(
    ("gold", "choices", "answer"),
    [
        ("2", ["1. kite", "2. drum", "3. lamp"], "B"),
        (2, {"1": "kite", "2": "drum", "3": "lamp"}, "B"),
        ("1", {"0": "kite", "1": "drum"}, "B"),
        ("5", ["1. 7", "2. 5"], "5"),  # the text behind a label
        ("D", {"C": "kite", "D": "drum"}, "D"),
        ("b", ["a. kite", "b. drum"], "B"),
        ("(ii)", ["(i) kite", "(ii) drum"], "B"),
        ("Б", ["А. kite", "Б. drum"], "B"),
        ("right", {"left": "kite", "right": "drum"}, "B"),
        ("2. drum", ["1. kite", "2. drum"], "B"),
        ("drum", ["1. kite", "2. drum"], "drum"),
        ("Ｂ", THREE, "B"),
        ("Option C", THREE, "C"),
        ("z", ["x", "y", "z"], "C"),
        (2, ["kite", None, "drum", "lamp"], "C"),
    ],
)
def test_a_rows_own_labels_decide(gold, choices, answer, tmp_path):
    assert golds(tmp_path, (gold, choices), (gold, choices)) == [answer] * 2


def test_a_letter_that_the_row_leaves_out_is_no_gold(tmp_path):
    rows = [("B", [None, "kite", "drum"]), ("C", THREE), ("A", [None, "kite", "drum"])]
    assert golds(tmp_path, *rows) == ["B", "C", "unparsable gold"]


@pytest.mark.parametrize("gold", [["A", "C"], "A, C", "C and A", "AC", "['A', 'C']", ["kite", "lamp"], ["A", "lamp"]])
def test_several_choices_that_are_all_meant(gold, tmp_path):
    assert golds(tmp_path, (gold, THREE)) == ["A, C"]


def test_positions_of_several_choices(tmp_path):
    assert golds(tmp_path, ([0, 2], THREE), ([1], THREE)) == ["A, C", "B"]
    assert golds(tmp_path, ("1;3", ["1. kite", "2. drum", "3. lamp"])) == ["A, C"]
    assert golds(tmp_path, (["kite", "car"], THREE), ("kite", THREE)) == ["unparsable gold", "kite"]
    assert golds(tmp_path, (["A", "kite"], THREE)) == ["A"]  # one choice in two spellings


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (["4", "four"], ("4", "four")),
        ("['4', 'four']", ("4", "four")),
        (["24/7", "3.43"], ("24/7", "3.43")),
        (["4", "4"], "4"),
        ([4], "4"),
        (["A", "C"], "A, C"),
        (["Route 66", "I-66"], ("Route 66", "I-66")),
        ("[1, 2]", "[1, 2]"),
        ("[0, 5)", "[0, 5)"),
        (3.0, "3"),
        (b"3", "3"),
        ("I think. <answer> 3 </answer>", "3"),
        ([None, "3"], "3"),
    ],
)
def test_golds_of_open_questions(value, answer):
    assert resolve(gold_items(value, None), None, {}) == answer


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1, 2], "several answers"),
        (["3", "5"], "are different numbers"),
        (None, "no answer"),
        ("", "no answer"),
        ([], "no answer"),
        (float("nan"), "no answer"),
        ({"text": "3"}, "a mapping with text; name one of them, as in 'answer.text'"),
        ([["3"]], "a list of lists"),
        (b"\xff\xfe", "not text"),
    ],
)
def test_golds_that_are_none(value, says):
    with pytest.raises(BadRow, match=says):
        resolve(gold_items(value, None), None, {})


def test_what_the_verifier_makes_of_it():
    from apo_lora.rewards.scores import accuracy_reward, gold_is_parsable
    from apo_lora.rewards.verifier import Verifier

    said = ["<answer>a square</answer>", "<answer>4.0</answer>", "<answer>\\frac{8}{2}</answer>", "<answer>5</answer>"]
    answer, right = ("4", "square"), [1.0, 1.0, 1.0, 0.0]
    assert [accuracy_reward(text, "4") for text in said] == [0.0, *right[1:]]
    in_process = [accuracy_reward(text, answer) for text in said]
    with Verifier() as verifier:
        assert verifier.score(said, [list(answer)] * 4) == in_process
    assert in_process == right
    assert gold_is_parsable(("", "four")) and not gold_is_parsable(("", "..."))
    own = read_choices({"B": "kite", "C": "drum"}).texts
    assert [accuracy_reward(f"<answer>{text}</answer>", "B", own) for text in ("B", "kite", "C", "A", "drum")] == [
        *(1.0, 1.0, 0.0, 0.0, 0.0)
    ]


def test_every_built_in_reward_takes_several_golds():
    from apo_lora.recipe.schema import RewardsSection
    from apo_lora.rewards.functions import reward_functions
    from apo_lora.rewards.verifier import Verifier

    rewards = RewardsSection(functions=("accuracy", "relaxed", "iou"), relaxed_tolerance=0.05)
    said, golds = ["<answer>101</answer>", "<answer>[0, 0, 4, 4]</answer>"], [["square", "100"], ["no", "[0, 0, 4, 4]"]]
    with Verifier() as verifier:
        scored = [f(completions=said, answer=golds, choices=[None] * 2) for f in reward_functions(rewards, verifier)]
    assert scored == [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
