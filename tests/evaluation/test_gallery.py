"""Answers as HTML: outcomes, sizes, pictures once each, and that whatever a model or a data set says stays text."""

import base64
import io
import re
from collections import Counter

import pytest
from PIL import Image
from report_runs import HOSTILE, answer_row, answer_rows, shown_sources, write_run

from apo_lora.evaluation.figures import paired
from apo_lora.evaluation.gallery import (
    LONGEST_SIDE,
    LONGEST_TEXT,
    AnswerSource,
    gallery,
    static_gallery,
    write_gallery,
)


@pytest.fixture
def root(tmp_path):
    return write_run(tmp_path / "run")


def source(rows, root, title="answers"):
    return AnswerSource(title, paired(rows), root)


def test_answers_are_paired_by_set_row_and_sample(tmp_path):
    rows = [
        answer_row(1, "base", False),
        answer_row(1, "base", True, sample=1),
        answer_row(1, "tuned", True),
        answer_row(1, "tuned", False, sample=1),
        answer_row(1, "base", True, set="general"),
    ]
    assert [pair.outcome for pair in paired(rows)] == ["fixed", "broken", "right"]
    assert source(rows, tmp_path).tallies == {"reasoning": {"fixed": 1, "broken": 1}}
    page = gallery([source(rows, tmp_path)], 10**6)
    assert [item.heading for item in shown_sources(page)["answers"]] == [
        "reasoning 1, level1", "reasoning 1, sample 1, level1", "general 1, level1",
    ]  # fmt: skip
    assert page.count("<td>0.500 → 0.500</td>") == 1


def test_pictures_are_kept_once_and_a_lost_one_is_no_error(root):
    (root / "images/bad.png").write_bytes(b"no picture")
    rows = [*answer_rows(), answer_row(99, "base", True, images=["images/bad.png", "images/board-7.png"])]
    page = gallery([source(rows, root), source(answer_rows(), root, "again")], 10**6)
    items = {item.heading: item.html for item in shown_sources(page)["answers"]}
    assert len(items) == 41 and page.count("data:image/webp") == 2
    used = [re.findall(r'href="#picture-(\d)"', items[f"reasoning {row}, level1"]) for row in (1, 2, 3, 99)]
    assert len(used[0]) == len(used[1]) == 1 and used[0] != used[1] and not used[2] and used[3] == used[1]
    assert [items[f"reasoning {row}, level1"].count("The image is missing") for row in (1, 3, 99)] == [0, 1, 1]
    assert re.findall("<li>(.*?)</li>", items["reasoning 2, level1"]) == ["2", "3", "4"]


def test_every_outcome_is_shown_where_not_all_fits(root):
    whole = gallery([source(answer_rows(), root)], 10**6)
    most = len(whole.encode("utf-8", "replace")) // 2
    some = gallery([source(answer_rows(), root)], most)
    (items,) = shown_sources(some).values()
    assert len(some.encode("utf-8", "replace")) <= most + 3000 and "of 40 recorded answers are shown" in some
    assert 14 <= len(items) < len(shown_sources(whole)["answers"]) == 40 and "recorded answers are shown" not in whole
    outcomes = Counter(item.outcome for item in items)
    assert outcomes["broken"] >= 3 and outcomes["wrong"] >= 3 and outcomes["fixed"] >= 3 and outcomes["right"] >= 3
    assert not shown_sources(gallery([source(answer_rows(), root)], 10))["answers"]


def test_long_texts_are_cut_and_a_missing_answer_is_said(tmp_path):
    rows = [answer_row(1, "tuned", False, text="x" * (LONGEST_TEXT + 50), answer=None, truncated=True)]
    page = gallery([source(rows, tmp_path)], 10**6)
    assert "(50 more characters)" in page and "no answer found" in page and "41 tokens, cut" in page


def hostile_rows():
    named = dict.fromkeys(("set", "problem", "gold", "text", "answer", "category"), HOSTILE)
    for model in ("base", "tuned"):
        yield answer_row(1, model, model == "tuned", **named, choices=[HOSTILE], images=["images/a.png", HOSTILE])


def test_the_page_of_an_evaluation_is_one_file_in_which_all_is_text(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (900, 600), "teal").save(tmp_path / "images/a.png")
    target = tmp_path / "evaluations/quick/gallery.html"
    write_gallery([*hostile_rows(), answer_row(2, "base", True, sample=1, text="SAMPLED")], tmp_path, target)
    page = target.read_text()
    assert page.count("<script") == page.count("</script>") == 1 and "<img" not in page and "SAMPLED" not in page
    assert page.count("&lt;script&gt;") >= 10 and "http://" not in page and "https://" not in page
    assert "default-src 'none'" in page.replace("&#39;", "'")
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    with Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]))) as picture:
        assert max(picture.size) == LONGEST_SIDE and picture.getpixel((5, 5))[1] > 100


def test_a_cell_of_a_notebook_gets_items_alone(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (900, 300)).save(tmp_path / "images/a.png")
    page = static_gallery(hostile_rows(), tmp_path)
    assert "<script" not in page and page.count("<article") == 1 and "&lt;script&gt;" in page
    assert page.count('<img alt="image of the problem" src="data:image/webp;base64,') == page.count("<img") == 1
    assert page.count("base</b>") == page.count("tuned</b>") == 1 and "✗ wrong" in page and "✓ right" in page
