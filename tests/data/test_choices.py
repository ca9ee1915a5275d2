"""Choices in every layout: their texts by letter, and the labels that the row itself gives them."""

import pytest

from apo_lora.data.choices import choice_lines, list_in_text, read_choices
from apo_lora.data.text import BadRow

TWO = ("kite", "drum")


@pytest.mark.parametrize(
    "value",
    [
        ["kite", "drum"],
        ["kite", "drum", None, ""],
        ["A. kite", "B. drum"],
        ["(a) kite", "(b) drum"],
        ["Ａ．kite", "Ｂ．drum"],
        ["A、kite", "B、drum"],
        ["① kite", "② drum"],
        ["⒜ kite", "⒝ drum"],
        ["1. kite", "2. drum"],
        ["i) kite", "ii) drum"],
        ["А) kite", "Б) drum"],
        ["Option A: kite", "Option B: drum"],
        ["A - kite", "B - drum"],
        ["[A] kite", "[B] drum"],
        {"A": "kite", "B": "drum", "C": None},
        {"2": "drum", "1": "kite"},
        {"left": "kite", "right": "drum"},
        {"label": ["A", "B"], "text": ["kite", "drum"]},
        [{"id": "A", "content": "kite"}, {"id": "B", "content": "drum"}],
        [["A", "kite"], ["B", "drum"]],
        [b"kite", b"drum"],
        '["kite", "drum"]',
        "['kite', 'drum']",
        "('kite', 'drum')",
        "['kite' 'drum']",
        "['kite'\n 'drum']",
        "array(['kite', 'drum'], dtype=object)",
        "['kite', 'drum', nan]",
        "{'A': 'kite', 'B': 'drum'}",
        "{'text': ['kite', 'drum'], 'label': ['A', 'B']}",
        "kite\ndrum",
        "A. kite\nB. drum",
        "A. kite; B. drum;",
        "a ) kite , b ) drum",
        "1) kite 2) drum",
    ],
)
def test_one_reading_of_every_layout(value):
    assert read_choices(value).texts == TWO


@pytest.mark.parametrize("value", [None, [], "", "None", "[]", float("nan"), [None, None], "[nan]"])
def test_nothing_is_no_choices(value):
    assert read_choices(value) is None


def test_scalars_become_texts():
    assert read_choices([3, 4.0, 0.5, True]).texts == ("3", "4", "0.5", "True")
    assert read_choices("[3 4 5]").texts == ("3", "4", "5")


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ({"B": "kite", "D": "drum"}, ("", "kite", "", "drum")),
        (["C. kite", "D. drum"], ("", "", "kite", "drum")),
        (["A. kite", "C. drum"], ("kite", "", "drum")),
        ({"A": None, "B": "kite"}, ("", "kite")),
        (["kite", None, "drum"], ("kite", "", "drum")),
        (["kite", float("nan"), "drum"], ("kite", "", "drum")),
        (["A. kite", "", "C. drum"], ("kite", "", "drum")),
    ],
)
def test_letters_keep_their_places(value, texts):
    assert read_choices(value).texts == texts
    assert choice_lines("Which?", texts) == "\n".join(f"{chr(65 + i)}. {text}" for i, text in enumerate(texts) if text)


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (["1. kite", "2. drum"], ("1", "2")),
        ({"0": "kite", "1": "drum"}, ("0", "1")),
        (["1: kite", "2: drum"], ("1", "2")),
        (["A/ kite", "B/ drum"], ("A", "B")),
        (["(i) kite", "(ii) drum"], ("I", "II")),
        (["甲、kite", "乙、drum"], ("甲", "乙")),
        (["kite", "drum"], ()),
    ],
)
def test_a_rows_own_labels_are_known(value, labels):
    assert read_choices(value).labels == labels


@pytest.mark.parametrize(
    "texts",
    [
        ["1:2", "2:3"],  # ratios
        ["a:b", "b:c"],
        ["1: 2", "2: 3"],
        ["a/b", "b/c"],
        ["1.5", "2.5"],
        ["a - b", "b - c"],
        ["A level", "B level"],
        ["1 m", "2 m"],
        ["A. kite", "drum"],
        ["A. kite", "A. drum"],
        ["(1, 2)", "(2, 3)"],
    ],
)
def test_what_only_looks_like_labels_is_text(texts):
    assert read_choices(texts).texts == tuple(texts)


def test_only_the_label_is_taken_off():
    assert read_choices(["A. x²＋1", "B. ½"]).texts == ("x²＋1", "½")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("kite, drum", "'kite, drum'"),
        ("['kite' 'drum', 'lamp']", "choices unreadable"),  # Python would read kitedrum
        ("{'kite', 'drum'}", "choices unreadable"),  # a set has no order
        ("[[[[['kite']]]]]", "a choice must be text"),
        ("[" * 100_000, "choices unreadable"),
        (7, "choices unreadable"),
        ([{"shape": "kite"}, {"shape": "drum"}], "a choice must be text"),
        ({"A": "kite", "a": "drum"}, "two choices have the same label"),
        (list(range(27)), "at most 26 are supported"),
    ],
)
def test_what_cannot_be_read_is_said(value, says):
    with pytest.raises(BadRow, match=says):
        read_choices(value)


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "made"
    for code in (f"[open({str(target)!r}, 'w')]", f"[__import__('pathlib').Path({str(target)!r}).touch()]"):
        with pytest.raises(BadRow):
            list_in_text(code)
    assert not target.exists()
