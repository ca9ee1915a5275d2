"""Overlap of boxes: read from every way that models write them, worked by hand, and never paid twice."""

import pytest

from apo_lora.rewards.boxes import boxes_in, iou_reward

GOLD = "[0, 0, 10, 10]"


def in_tags(text):
    return f"<think>Perhaps [9, 9, 90, 90].</think><answer>{text}</answer>"


@pytest.mark.parametrize(
    "text",
    [
        "[10, 20, 30, 40]",
        "10 20 30 40",
        "(10,20),(30,40)",
        "<|box_start|>(10,20),(30,40)<|box_end|>",
        "[[10.0, 20, 30, 40.0]]",
        '```json\n[\n  {"bbox_2d": [10, 20, 30, 40], "label": "cup 2"}\n]\n```',
        r"\boxed{[10, 20, 30, 40]}",
        "[ 10;\n20;\n30;\n40 ]",
    ],
)
def test_ways_to_write_a_box(text):
    assert boxes_in(text) == [(10, 20, 30, 40)]


@pytest.mark.parametrize(
    "text", ["", "no box", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[3, 2, 1, 4]", "[1, 4, 3, 4]", "[-1, 2, 3, 4]", "1.2.3.4"]
)
def test_what_is_no_box(text):
    assert boxes_in(text) == []


def test_thousandths_end_at_1000():
    assert boxes_in("[0, 0, 1000, 1000]", "thousandths") and boxes_in("[0, 0, 1001, 9]", "pixels")
    assert boxes_in("[0, 0, 1001, 9]", "thousandths") == []
    assert iou_reward(in_tags("[0, 0, 1200, 800]"), "[0, 0, 1200, 800]", "thousandths") == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (GOLD, 1.0),
        ("[5, 0, 15, 10]", 50 / 150),  # half of each
        ("[0, 0, 5, 5]", 25 / 100),
        ("[2.5, 2.5, 7.5, 7.5]", 25 / 100),
        ("[10, 0, 20, 10]", 0.0),  # they touch
        ("[20, 20, 30, 30]", 0.0),
        ("[0, 0, 10, 10], [0, 0, 10, 10]", 1 / 2),  # a second guess costs
        ("[0, 0, 10, 10], [50, 50, 60, 60], [70, 70, 80, 80]", 1 / 3),
        ("somewhere", 0.0),
        ("not [0, 0, 10, 10]", 0.0),
        ('{"bbox_2d": [0, 0, 10, 10], "label": "no hat"}', 1.0),
    ],
)
def test_overlap_with_one_box(said, expected):
    assert iou_reward(in_tags(said), GOLD) == pytest.approx(expected)


def test_several_boxes_are_paired_once_each_and_in_any_order():
    gold = "[0, 0, 10, 10], [100, 100, 110, 110]"
    assert iou_reward(in_tags("[100, 100, 110, 110], [0, 0, 10, 10]"), gold) == 1
    assert iou_reward(in_tags("[100, 100, 110, 110], [5, 0, 15, 10]"), gold) == pytest.approx((1 + 1 / 3) / 2)
    assert iou_reward(in_tags("[0, 0, 10, 10]"), gold) == 1 / 2  # one is missing
    # The better of two candidates gets the pair, wherever it stands.
    assert iou_reward(in_tags("[5, 0, 15, 10], [0, 0, 10, 10]"), "[0, 0, 10, 10]") == 1 / 2


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>[0, 0, 10, 10]</think>", 0),  # only thought
        ("<think>[0, 0, 10, 10]", 0),
        ("<answer>[1, 1, 2, 2]</answer> no: <answer>[0, 0, 10, 10]</answer>", 1),
        ("<answer>[0, 0, 10, 10]", 1),
        ('First [1, 1, 2, 2].\n```json\n[{"bbox_2d": [0, 0, 10, 10]}]\n```\nThat is all.', 1),
        ("First [1, 1, 2, 2].\nThe box is [0, 0, 10, 10].\nDone.", 1),
    ],
)
def test_where_the_box_is_looked_for(completion, expected):
    assert iou_reward(completion, GOLD) == expected


@pytest.mark.parametrize("gold", ["", "a cup", "[4, 4, 4, 4]"])
def test_gold_without_a_box_earns_nothing(gold):
    assert iou_reward(in_tags(GOLD), gold) == 0


@pytest.mark.parametrize("text", ["[0, 0, 10, 10], " * 100_000, "1 " * 500_000, "( " * 500_000, "1,\n" * 300_000])
@pytest.mark.parametrize("wrap", [str, in_tags])
def test_a_megabyte_is_no_box(text, wrap):
    """A quadratic search would take minutes."""
    assert iou_reward(wrap(text), GOLD) < 0.1
