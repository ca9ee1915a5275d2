"""The report on a data set, worked by hand on small ones."""

import pytest
from PIL import Image

from apo_lora.data.examples import Example, Loaded, prompt_lengths
from apo_lora.data.images import ImageRef
from apo_lora.data.report import answer_kind, report, spread
from apo_lora.recipe.schema import DataSection
from apo_lora.tiny import BASE_DIR


def example(answer: str, choices=None, size=None, row=1, category=None) -> Example:
    images = (ImageRef("i", size, Image.new("RGB", size)),) if size else ()
    return Example(row, "How many?", answer, choices, images, category)


@pytest.mark.parametrize(
    ("answer", "choices", "kind"),
    [
        ("3", None, "number"),
        ("-1,250.5", None, "number"),
        ("$42$", None, "number"),
        ("3/4", None, "number"),
        ("50%", None, "number"),
        ("B", None, "choice letter"),
        ("(B)", ("1", "2"), "choice letter"),
        ("2", ("1", "2"), "choice text"),
        ("C", ("A", "C"), "choice text"),
        ("Yes.", None, "yes/no"),
        ("False", None, "yes/no"),
        (r"\frac{1}{2}", None, "latex"),
        ("x^2", None, "latex"),
        ("a red ball", None, "text"),
        (".", None, "text"),
    ],
)
def test_answer_kind(answer, choices, kind):
    assert answer_kind(example(answer, choices)) == kind


def test_spread_is_made_of_values_that_occur():
    percents = (0, 50, 95, 100)
    assert spread([5], percents) == [5, 5, 5, 5]
    assert spread(range(1, 101), percents) == [1, 50, 95, 100]
    assert spread([1, 2, 3, 4], percents) == [1, 2, 4, 4]


def test_report_without_a_processor():
    sizes = [(28, 28), (100, 50), (10, 30), None]
    examples = [example(str(i), size=size, row=i, category="count") for i, size in enumerate(sizes, start=1)]
    dropped = {
        "no answer": [(9, "the answer is empty")],
        "image missing": [(5, "no file x.png"), (12, "no file y.png")],
    }
    assert report(Loaded("here.jsonl", examples, dropped, 7), DataSection(train="x")) == [
        "data        here.jsonl",
        "rows        7 (4 usable, 3 dropped)",
        "answers     number: 4",
        "categories  count: 4",
        "images      3; rows with 0: 1, rows with 1: 3",
        "image size  min 10 x 30, median 28 x 28, max 100 x 50",
        "dropped row 5: image missing (no file x.png)",
        "dropped row 9: no answer (the answer is empty)",
        "dropped row 12: image missing (no file y.png)",
    ]


def test_report_of_nothing():
    assert report(Loaded("here", [], {}, 0), DataSection(train="x")) == [
        "data     here",
        "rows     0 (0 usable, 0 dropped)",
        "answers  none",
        "images   0; none",
    ]


def test_report_counts_prompt_tokens():
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(BASE_DIR)
    examples = [example("1", size=(28 * side, 28 * side)) for side in (2, 3, 4)]
    least, middle, most = prompt_lengths(examples, processor, DataSection(train="x"))
    assert most - least == 16 - 4
    data = DataSection(train="x", max_prompt_tokens=middle)
    assert report(Loaded("here", examples, {}, 3), data, processor)[-1] == (
        f"prompt tokens  min {least}, median {middle}, 95% {most}, max {most}; 1 over the limit of {middle}"
    )
