"""Which column is which, and what is said of columns that are not read."""

import base64
import re

import pytest
from data_sets import load, only, png, section, write_jsonl

from apo_lora.data.examples import drop_undecodable
from apo_lora.errors import DataError

ROW = {"problem": "Which?", "answer": "3"}


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"gt": "7"}, "7"),
        ({"correct_answer": 7}, "7"),
        ({"answers": ["7", "seven"]}, ("7", "seven")),
        ({"A": "6", "B": "7", "C": None, "answer": "B"}, "B"),
        ({"option_a": "6", "option_b": "7", "answer": "option_b"}, "B"),
        ({"ending0": "6", "ending1": "7", "ending2": "8", "label": 1}, "B"),
    ],
)
def test_usual_columns_of_answers_and_choices(row, answer, tmp_path):
    example = only(load(write_jsonl(tmp_path / "data.jsonl", [{"question": "Which?", **row}])))
    assert example.answer == answer and (answer != "B" or "7" in example.choices[1])


def test_columns_that_only_look_like_choices(tmp_path):
    for row in ({"Q": "Which?", "A": "3"}, {**ROW, "option": None, "A": "x", "C": "y"}, {**ROW, "B": "x", "C": "y"}):
        columns = {"problem": "Q", "answer": "A"} if "Q" in row else {}
        path = write_jsonl(tmp_path / "data.jsonl", [row])
        assert only(load(path, data=section(columns=columns))).choices is None


def test_a_column_that_comes_late_is_found(tmp_path):
    rows = [ROW] * 150 + [{**ROW, "answer": "B", "choices": ["1", "2"]}]
    assert load(write_jsonl(tmp_path / "data.jsonl", rows)).examples[-1].choices == ("1", "2")


def test_a_column_that_hardly_a_row_fills_yields(tmp_path):
    rows = [{"problem": "Which?", "answer": "odd", "solution": "3"}] + [{"problem": "Which?", "solution": "3"}] * 40
    assert {e.answer for e in load(write_jsonl(tmp_path / "data.jsonl", rows)).examples} == {"3"}


def test_choices_switched_off(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{**ROW, "choices": ["3", "4"]}] * 3 + [{**ROW, "choices": None}])
    assert load(path).examples[0].choices == ("3", "4")
    loaded = load(path, data=section(columns={"choices": "none"}))
    assert {example.choices for example in loaded.examples} == {None}
    assert loaded.warnings == (
        f"{path}: 3 rows have choices in the column 'choices', which are not read, as data.columns.choices is none "
        "(rows 1, 2, 3)",
    )
    letters = write_jsonl(tmp_path / "letters.jsonl", [{**ROW, "answer": "B", "choices": ["3", "4"]}])
    with pytest.raises(DataError, match="a letter of 'choices', which data.columns.choices=none leaves out"):
        load(letters, data=section(columns={"choices": "none"}))


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "read", "says"),
    [
        (("image", "image2"), 2, "are those of the columns image, image2, in this order"),
        (("image_1", "image_2"), 2, "in this order"),
        (("image", "other"), 1, r"1 rows have an image in the column 'other', .*\(row 1\).*\[image, other\]"),
        (("img", "mask"), 1, "'mask', which is not read"),
    ],
)  # fmt: skip
def test_a_second_column_of_images_is_read_or_named(names, read, says, folder):
    path = write_jsonl(folder / "data.jsonl", [{**ROW, names[0]: "a.png", names[1]: "b.png"}])
    loaded = load(path)
    assert [image.name for image in only(loaded).images] == ["a.png", "b.png"][:read]
    (warning,) = loaded.warnings
    assert re.search(says, warning)
    named = load(path, data=section(columns={"image": names[::-1]}))
    assert [image.name for image in only(named).images] == ["b.png", "a.png"] and not named.warnings


def test_the_same_image_in_two_columns_is_no_second_one(folder):
    row = {**ROW, "image": "a.png", "source": "elsewhere/2024/a.png", "image_url": "https://x.org/a.png"}
    assert load(write_jsonl(folder / "data.jsonl", [row])).warnings == ()


def test_unknown_columns_of_images_are_refused(folder):
    chat = {"messages": [{"role": "user", "content": "Which?"}], "answer": "3"}
    for row in ({**ROW, "left": "a.png", "right": "b.png"}, {**chat, "left": ["a.png"], "right": ["b.png"]}):
        with pytest.raises(DataError, match="column 'left', 'right' seems to contain images; set data.columns.image"):
            load(write_jsonl(folder / "data.jsonl", [row]))
    urls = {**chat, "image_urls": ["https://x.org/a.png"]}
    with pytest.raises(DataError, match="image is a URL"):
        load(write_jsonl(folder / "data.jsonl", [urls]))


@pytest.mark.parametrize("coded", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
def test_images_in_base64(coded, tmp_path):
    text = coded(png(size=(60, 30))).decode()
    for value in (text, [text], {"bytes": text}, {"path": None, "bytes": text}):
        example = only(load(write_jsonl(tmp_path / "data.jsonl", [{**ROW, "image": value}])))
        assert example.images[0].size == (60, 30) and example.images[0].open().getpixel((0, 0)) == (255, 0, 0)
    cut = drop_undecodable(load(write_jsonl(tmp_path / "data.jsonl", [ROW] * 2 + [{**ROW, "image": text[:90]}])))
    assert cut.dropped["image unreadable"][0][0] == 3


@pytest.mark.parametrize(
    "column", [{"video": "a.mp4"}, {"videos": ["x"]}, {"clip": "b/a.webm"}, {"audio": {"path": "a.wav", "bytes": None}}]
)
def test_videos_and_sound_are_never_lost_in_silence(column, folder):
    rows = [{**ROW, "image": "a.png"}] * 2 + [{**ROW, **column}, {**ROW, "image": "a.png", **column}]
    loaded = load(write_jsonl(folder / "data.jsonl", rows))
    assert [row for row, _ in loaded.dropped["video or sound"]] == [3] and len(loaded.examples) == 3
    assert re.search(
        r"2 rows have video or sound in the column '\w+', which is not read \(rows 3, 4\)", loaded.warnings[0]
    )


def test_numbered_marks_name_the_images(tmp_path):
    import pandas

    pictures = {f"image_{n}": [png(color)] for n, color in enumerate(("red", "lime", "blue"), start=1)}
    row = {"question": ["<image 3> or <image 1>? In <image 3>?"], "options": ["['<image 2>', 'none']"], "answer": ["A"]}
    pandas.DataFrame({**row, **pictures}).to_parquet(tmp_path / "data.parquet")
    example = only(load(tmp_path / "data.parquet"))
    assert example.problem == "<image> or <image>? In image 3?\nA. <image>\nB. none"
    assert [image.open().getpixel((0, 0)) for image in example.images] == [(0, 0, 255), (255, 0, 0), (0, 255, 0)]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_golds_that_may_be_lost_are_counted(tmp_path):
    rows = [
        {**ROW, "answer": "B"},
        {**ROW, "answer": "B", "problem": "Which? (A) kite (B) drum"},
        {**ROW, "answer": "Because it is so. " * 20},
        {**ROW, "answer": "Because it is so. " * 20 + "\\boxed{3}"},
        {**ROW, "answer": "B", "choices": ["kite", "drum"]},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    letters, proofs = load(path).warnings
    assert letters.startswith(
        f"{path}: 1 gold answers are a letter, but there are no choices (row 1); set data.columns"
    )
    assert proofs.startswith(f"{path}: 1 gold answers are longer than 200 characters (row 3); no completion")
    assert load(path).lines()[1:] == [f"warning: {letters}", f"warning: {proofs}"]


def test_what_only_sounds_like_media_is_none(tmp_path):
    rows = [{**ROW, "problem": "Which one plays a.mp4", "video": False, "audio": {"path": None}, "videos": []}] * 2
    loaded = load(write_jsonl(tmp_path / "data.jsonl", rows))
    assert len(loaded.examples) == 2 and not loaded.warnings


def test_a_mark_of_a_video_or_sound_without_an_image_is_dropped(folder):
    rows = [
        {"problem": "<video>What falls?", "answer": "ball"},
        {"problem": "<Audio>Who speaks?", "answer": "Ann"},
        {"problem": "What is <b>bold</b>?", "answer": "text"},
        {"problem": "Which of the two?", "answer": "left"},
        {"problem": "What is round?", "answer": "ball"},
    ]
    loaded = load(write_jsonl(folder / "data.jsonl", rows))
    assert [row for row, _ in loaded.dropped["video or sound"]] == [1, 2] and len(loaded.examples) == 3
