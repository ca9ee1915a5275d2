"""Tables of words."""

import pytest

from apo_lora.run.tables import aligned, markdown

ROWS = [["set", "items", "how"], ["dots", "8", "counted twice"], ["A-OKVQA", "1145", "once"]]


def test_the_first_column_is_flush_left_and_the_others_flush_right():
    assert aligned(ROWS) == [
        "set      items            how",
        "dots         8  counted twice",
        "A-OKVQA   1145           once",
    ]


def test_the_columns_named_are_flush_left_and_lines_have_no_trailing_space():
    assert aligned(ROWS, left=(0, 2)) == [
        "set      items  how",
        "dots         8  counted twice",
        "A-OKVQA   1145  once",
    ]


def test_markdown_escapes_bars():
    assert markdown([["a", "b"], ["1|2", "3"]]) == ["| a | b |", "| --- | --- |", "| 1\\|2 | 3 |"]


@pytest.mark.parametrize("table", [aligned, markdown])
def test_a_heading_without_rows_is_no_table(table):
    assert table([["set", "items"]]) == []
