"""The report on a data set, worked by hand on small ones."""

import pytest
from PIL import Image

from apo_lora.data.examples import Example, Loaded, prompt_lengths
from apo_lora.data.images import ImageRef
from apo_lora.data.report import Spread, answer_kind, report
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
    assert Spread.of([5]) == Spread(5, 5, 5, 5)
    assert Spread.of(range(1, 101)) == Spread(1, 50, 95, 100)
    assert Spread.of([4, 1, 2, 3]) == Spread(1, 2, 4, 4)


def test_report_without_a_processor():
    sizes = [(28, 28), (100, 50), (10, 30), None]
    examples = [example(str(i), size=size, row=i, category="count") for i, size in enumerate(sizes, start=1)]
    dropped = {
        "no answer": [(9, "the answer is empty")],
        "image missing": [(5, "no file x.png"), (12, "no file y.png")],
    }
    assert report(Loaded("here.jsonl", examples, dropped, 7), DataSection(train="x")).lines() == [
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
    assert report(Loaded("here", [], {}, 0), DataSection(train="x")).lines() == [
        "data     here",
        "rows     0 (0 usable, 0 dropped)",
        "answers  none",
        "images   0; none",
    ]


def test_report_counts_prompt_tokens():
    if not BASE_DIR.is_dir():
        pytest.skip(f"no {BASE_DIR}")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(BASE_DIR)
    examples = [example("1", size=(28 * side, 28 * side)) for side in (2, 3, 4)]
    lengths = prompt_lengths(examples, processor, DataSection(train="x"))
    found = report(Loaded("here", examples, {}, 3), DataSection(train="x", max_prompt_tokens=lengths[1]), processor)
    assert found.prompt_tokens == Spread(lengths[0], lengths[1], lengths[2], lengths[2])
    assert lengths[2] - lengths[0] == 16 - 4
    assert found.num_too_long == 1
    assert found.lines()[-1].endswith(f"1 over the limit of {lengths[1]}")
