"""The columns of a row that a user's own rewards are given."""

import json

import pytest
from data_sets import png

from apo_lora.data.examples import load_examples
from apo_lora.data.items import prompt_dataset
from apo_lora.recipe.schema import DataSection

ROWS = [
    {"problem": "Where?", "solution": "4", "bbox": [1, 2], "id": 7, "index": 70, "image": "a.png", "prompts": "x"},
    {"problem": "Where?", "solution": "5", "meta": {"from": "b"}, "image": "a.png", "completion": "y"},
]


@pytest.fixture
def items(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = DataSection(train=str(path))
    return prompt_dataset(load_examples(str(path), data, split="train").examples, data).__getitems__([0, 1, 0])


def test_every_column_arrives_and_none_where_a_row_lacks_it(items):
    assert [item["bbox"] for item in items] == [[1, 2], None, [1, 2]]
    assert [item["id"] for item in items] == [7, None, 7]
    assert [item["meta"] for item in items] == [None, {"from": "b"}, None]
    assert [item["solution"] for item in items] == ["4", "5", "4"]


def test_what_has_a_meaning_here_or_for_trl_keeps_it(items):
    assert [item["answer"] for item in items] == ["4", "5", "4"]
    assert [item["index"] for item in items] == [0, 1, 0]  # the place among the examples, not the row's own
    assert not {"prompts", "completion", "image"} & set(items[0])
    assert items[0]["images"][0].size == items[1]["images"][0].size


def test_a_table_keeps_its_pictures_to_itself(tmp_path, folder):
    import datasets

    table = datasets.Dataset.from_list(
        [{"problem": "Where?", "answer": "4", "image": {"bytes": png("red"), "path": None}, "mask": b"12"}]
    )
    table.to_parquet(tmp_path / "rows.parquet")
    data = DataSection(train=str(tmp_path / "rows.parquet"))
    (example,) = load_examples(data.train, data, split="train").examples
    assert set(example.columns) == {"problem", "answer"}
