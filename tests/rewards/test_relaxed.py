"""Accuracy with a tolerance: numbers within 5 %, read as the verifier reads them."""

import pytest

from apo_lora.rewards.relaxed import nearly_equal


def in_tags(text):
    return f"<think>Between 1 and 99.</think><answer>{text}</answer>"


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("41.5", "42"),
        ("44.1", "42"),  # 5 % exactly
        ("39.9", "42"),
        ("-41", "-42"),
        ("41%", "42%"),
        ("0.41", "42%"),
        ("41%", "0.42"),
        ("1,150,000", "1.2 million"),
        ("1.15 million", "1,200,000"),
        ("$41", "$42"),
        ("41 cm", "42 cm"),
        (r"\frac{83}{2}", "42"),
        ("about 41.5", r"\boxed{42}"),
        ("x = 41", "42"),
        ("0", "0"),
    ],
)
def test_near_enough(said, gold):
    assert nearly_equal(in_tags(said), gold, 0.05)


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("39.8", "42"),
        ("44.2", "42"),
        ("41", "-42"),
        ("41", "0.42"),
        ("41 m", "42 cm"),
        ("1.15", "1.2 million"),
        ("41 or 42", "42"),
        ("41, 43", "42"),
        ("between 40 and 44", "42"),
        (" ".join(map(str, range(35, 50))), "42"),
        ("0.01", "0"),
        ("red", "42"),
        ("42", "red"),
        ("", "42"),
    ],
)
def test_not_near_enough(said, gold):
    assert not nearly_equal(in_tags(said), gold, 0.05)


def test_the_tolerance_is_an_option():
    assert nearly_equal(in_tags("45"), "50", 0.1) and not nearly_equal(in_tags("45"), "50", 0.09)
    assert nearly_equal(in_tags("50.0"), "50", 0.0) and not nearly_equal(in_tags("50.1"), "50", 0.0)


@pytest.mark.parametrize(
    "completion", ["So the total was 41.5 in the end.", "The answer is 41.5.", r"Hence $\boxed{41.5}$"]
)
def test_prose_and_boxes(completion):
    assert nearly_equal(completion, "42", 0.05) and not nearly_equal(completion, "50", 0.05)
