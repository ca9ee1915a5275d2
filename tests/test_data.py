"""Data sets of every format, good and bad, built on the spot; decoding is counted, since loading must do none."""

import base64
import copy
import io
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from apo_lora.data import images as data_images
from apo_lora.data.examples import (
    Example,
    Loaded,
    drop_long_prompts,
    drop_undecodable,
    load_examples,
    prompt_dataset,
    prompt_lengths,
)
from apo_lora.data.formats import BadRow, choice_lines, read_answer, read_choices, read_row
from apo_lora.data.images import ImageRef, image_refs, to_rgb
from apo_lora.errors import DataError
from apo_lora.recipe import DataSection
from apo_lora.tiny import BASE_DIR

SHARED = Path(__file__).parents[2] / "shared" / "data"
PROCESSORS = {"tiny": BASE_DIR, "3b": SHARED / "qwen2.5-vl-3b-processor"}
SIZES = ((84, 84), (300, 200), (1000, 40), (29, 2000), (5, 7))


def section(**keys) -> DataSection:
    return DataSection(train="unused", **keys)


def load(path, *, split="train", data=None, **keys) -> Loaded:
    keys.setdefault("correct_gold", lambda answer, choices: answer != "unparsable")
    return load_examples(str(path), data or section(), split=split, **keys)


def picture(color="red", size=(60, 30), mode="RGB") -> Image.Image:
    return Image.new(mode, size, color)


def png(*args, **keys) -> bytes:
    return encoded(picture(*args, **keys))


def encoded(image: Image.Image, form="PNG", **keys) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **keys)
    return stream.getvalue()


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two images; the cache of `datasets` is inside the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    home = tmp_path / "set"
    home.mkdir()
    (home / "a.png").write_bytes(png("red"))
    (home / "b.png").write_bytes(png("blue", size=(20, 40)))
    return home


@pytest.fixture
def decodings(monkeypatch):
    """Grows by one with every image that is decoded."""
    seen = []
    decode = ImageFile.ImageFile.load

    def counted(self):
        if getattr(self, "tile", None):
            seen.append(self.size)
        return decode(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    return seen


def only(loaded: Loaded) -> Example:
    assert loaded.dropped == {}, loaded.dropped
    (example,) = loaded.examples
    return example


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "problem": "How many?", "answer": "3"},
        {"images": ["a.png"], "question": "How many?", "solution": "<answer> 3 </answer>"},
        {"img": {"path": "a.png", "bytes": None}, "query": "How many?", "label": 3},
        {"image_path": "./a.png", "prompt": "How many?", "gold": 3.0, "answer": None},
        {"file_name": "a.png", "text": "<image>How many?", "target": ["3"]},
        {"message": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, "How many?"]}], "answer": "3"},
        {
            "message": json.dumps(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How many?"}],
                    }
                ]
            ),
            "answer": "3",
        },
        {
            "id": 1,
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": 3}],
        },
        {
            "messages": [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "no"}],
            "images": ["a.png"],
            "solution": "<answer> 3 </answer>",
        },
        {
            "messages": [
                {"role": "user", "content": "<image>How many?"},
                {"role": "assistant", "content": "<answer> 3 </answer>"},
            ],
            "images": [{"path": "a.png"}],
        },
        {  # as Arrow gives it: every key in every part
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None, "image": None},
                        {"type": "text", "text": "How many?", "image": None},
                    ],
                }
            ],
            "images": ["a.png"],
            "reward_model": {"style": "rule", "ground_truth": "3"},
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "How many?"},
                    ],
                }
            ],
            "answer": 3,
        },
        {"image": "data:image/png;base64," + base64.b64encode(png()).decode(), "problem": "How many?", "answer": "3"},
    ],
)
def test_every_format_gives_the_same_example(folder, row):
    example = only(load(write_jsonl(folder / "data.jsonl", [row])))
    assert (example.answer, example.choices, example.row) == ("3", None, 1)
    assert example.messages(section()) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    ]
    assert example.images[0].size == (60, 30)
    assert example.images[0].open().getpixel((0, 0)) == (255, 0, 0)


def test_system_message_of_a_row_yields_to_the_recipe(folder):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    example = only(load(write_jsonl(folder / "data.jsonl", [{"messages": turns, "answer": "x"}])))
    assert example.messages(section())[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert example.messages(section(system_prompt="Think."))[0]["content"][0]["text"] == "Think."
    assert [m["role"] for m in example.messages(section(system_prompt=""))] == ["user"]


def test_columns_named_in_the_recipe(folder):
    row = {"pic": "a.png", "ask": "How many?", "problem": "not this", "meta": {"gold": "3"}, "opts": ["3", "4"]}
    data = section(image_column="pic", problem_column="ask", answer_column="meta.gold", choices_column="opts")
    example = only(load(write_jsonl(folder / "data.jsonl", [row]), data=data))
    assert (example.problem, example.answer, example.choices) == ("How many?", "3", ("3", "4"))
    assert example.images[0].name == "a.png"


@pytest.mark.parametrize("ending", ["json", "jsonl", "lines.json", "wrapped.json"])
def test_json_in_its_spellings(folder, ending):
    rows = [{"image": f"{name}.png", "problem": "?", "answer": name} for name in "ab"]
    path = folder / f"data.{ending}"
    if ending in ("jsonl", "lines.json"):
        write_jsonl(path, rows)
    else:
        path.write_text("\ufeff" + json.dumps({"data": rows} if ending == "wrapped.json" else rows))
    assert [example.answer for example in load(path).examples] == ["a", "b"]


def test_jsonl_rows_are_numbered_by_line(folder):
    path = folder / "data.jsonl"
    good = json.dumps({"problem": "?", "answer": "1"})
    path.write_text(f"\n{good}\n\n{good}\n")
    assert [example.row for example in load(path).examples] == [2, 4]
    assert [example.row for example in load(path, limit=1).examples] == [2]


@pytest.mark.parametrize("image", ["struct", "bytes", "path", "list", "feature"])
def test_parquet_images(folder, image):
    import datasets
    import pandas

    values = {
        "struct": [{"bytes": png("red"), "path": "x.png"}, {"bytes": None, "path": "b.png"}],
        "bytes": [png("red"), png("blue", size=(20, 40))],
        "path": ["a.png", "b.png"],
        "list": [[png("green"), png("red")], [png("blue", size=(20, 40))]],
        "feature": [{"bytes": png("red"), "path": None}, {"bytes": png("blue", size=(20, 40)), "path": None}],
    }[image]
    table = {"image": values, "problem": ["one", "two"], "answer": [1, 2]}
    if image == "feature":
        features = datasets.Features(
            image=datasets.Image(), problem=datasets.Value("string"), answer=datasets.Value("int64")
        )
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / "data.parquet")
    else:
        pandas.DataFrame(table).to_parquet(folder / "data.parquet")
    first, second = load(folder / "data.parquet").examples
    assert first.images[-1].open().getpixel((0, 0)) == (255, 0, 0)
    assert second.images[0].size == (20, 40) and second.images[0].open().getpixel((0, 0)) == (0, 0, 255)
    assert len(first.images) == (2 if image == "list" else 1)
    assert first.images[-1].path == (folder / "a.png" if image == "path" else None)
    assert len({image.name for image in (*first.images, *second.images)}) == len(first.images) + 1
    if image != "path":
        # A reference into the table on disk; no example holds bytes.
        assert isinstance(first.images[0].source, data_images.Cell)
        assert first.images[0].source.column.cache_files


def test_folders_and_splits(folder):
    import datasets

    write_jsonl(folder / "train.jsonl", [{"problem": "?", "answer": "of train"}])
    write_jsonl(folder / "test.jsonl", [{"problem": "?", "answer": "of test"}])
    assert only(load(folder)).answer == "of train"
    assert only(load(folder, split="test")).answer == "of test"
    with pytest.raises(DataError, match="several files"):
        load(folder, split="validation")

    saved = datasets.Dataset.from_list([{"image": {"bytes": png(), "path": None}, "problem": "?", "answer": "saved"}])
    saved.save_to_disk(folder / "saved")
    assert only(load(folder / "saved")).answer == "saved"
    datasets.DatasetDict(test=saved).save_to_disk(folder / "dict")
    assert only(load(folder / "dict", split="test")).answer == "saved"
    with pytest.raises(DataError, match="no split 'train'; it holds test"):
        load(folder / "dict")


def test_sharded_parquet_of_a_cloned_data_set(folder):
    import pandas

    (folder / "data").mkdir()
    for shard in (0, 1):
        table = pandas.DataFrame({"problem": ["?"] * 2, "answer": [shard * 2, shard * 2 + 1]})
        table.to_parquet(folder / "data" / f"train-0000{shard}-of-00002.parquet")
    assert [example.answer for example in load(folder).examples] == ["0", "1", "2", "3"]


def test_hub_data_set_through_datasets(folder, monkeypatch):
    import datasets

    features = datasets.Features(
        image=datasets.Image(), problem=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(), "path": None}] * 3, "problem": ["?"] * 3, "label": [0, 1, 1]}, features=features
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: asked.append((args, keys)) or table)
    loaded = load("someone/animals:small", limit=2)
    assert asked == [(("someone/animals", "small"), {"split": "train"})]
    assert [example.answer for example in loaded.examples] == ["cat", "dog"]

    def refuse(*args, **keys):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="neither a local path nor .*Couldn't reach the Hub.;") as caught:
        load("someone/animals")
    assert "\n" not in str(caught.value)


def test_boards():
    loaded = load("boards", limit=5, seed=3)
    again = load("boards", limit=5, seed=3)
    other = load("boards", limit=5, seed=4)
    assert [e.problem for e in loaded.examples] == [e.problem for e in again.examples]
    assert [e.images[0].open().tobytes() for e in loaded.examples] != [
        e.images[0].open().tobytes() for e in other.examples
    ]
    assert loaded.examples[4].images[0].name == "boards/train/5"
    assert loaded.examples[0].category.startswith("level")
    assert {e.category for e in load("boards:general", split="test", limit=3).examples} == {"general"}
    assert {e.category for e in load("boards", limit=30).examples} == {"level1", "level2", "level3"}
    assert {e.category for e in load("boards:level2", limit=30).examples} == {"level2"}
    with pytest.raises(DataError, match="no split 'validation'"):
        load("boards", split="validation")


def test_boards_are_gradable_and_2048_by_default():
    loaded = load_examples("boards", section(), split="train")  # with the real verifier
    assert loaded.summary() == "2048 rows of boards (train); none dropped"


# --- problem, answer, choices ----------------------------------------------------------------------------------------


def content(example: Example, **keys) -> list:
    return ["<image>" if p["type"] == "image" else p["text"] for p in example.messages(section(**keys))[-1]["content"]]


def example_of(problem: str, num_images=0, choices=None) -> Example:
    images = tuple(ImageRef(f"{i}", (28, 28), picture(size=(28, 28))) for i in range(num_images))
    return Example(1, problem, "x", choices, images)


@pytest.mark.parametrize(
    ("problem", "num_images", "parts"),
    [
        ("Why?", 0, ["Why?\nI"]),
        ("Why?", 2, ["<image>", "<image>", "Why?\nI"]),
        ("<image>\nWhy?", 1, ["<image>", "Why?\nI"]),
        ("Is <image> like <image>?", 2, ["Is ", "<image>", " like ", "<image>", "?\nI"]),
        ("Is <image> like it?", 2, ["<image>", "Is ", "<image>", " like it?\nI"]),
        ("See <image>", 1, ["See ", "<image>", "I"]),
    ],
)
def test_parts_in_order_with_the_instruction_last(problem, num_images, parts):
    assert content(example_of(problem, num_images), instruction="I") == parts


def test_choices_are_shown_once():
    choices = ("30", "1.5 m")
    assert content(example_of("Which?", choices=choices), instruction="Say it.") == ["Which?\nA. 30\nB. 1.5 m\nSay it."]
    for shown in ("Which? A. 30  B. 1.5 m", "Which?\n(A) 30\n(B) 1.5 m", "Which?\nA: 30\nB: 1.5  m"):
        assert choice_lines(shown, choices) == ""
    assert choice_lines("Is it 30 or 1.5 m?", choices) == "A. 30\nB. 1.5 m"
    assert choice_lines("Why?", None) == ""


def test_choices_in_their_spellings():
    same = [
        ["3", "4"],
        [3, 4.0],
        ["A. 3", "B. 4"],
        ["(A) 3", "(B) 4"],
        {"A": "3", "B": "4", "C": None},
        '["3", "4"]',
        "A. 3\nB. 4",
    ]
    assert {read_choices(value) for value in same} == {("3", "4")}
    assert [read_choices(value) for value in (None, [], "", "one line", 5, [None])] == [None] * 6
    assert read_choices(["A. 3", "4"]) == ("A. 3", "4")
    with pytest.raises(BadRow, match="letters end at 26"):
        read_choices(list(range(27)))


def test_answers_in_their_spellings():
    assert [read_answer(v, None) for v in ("3", 3, 3.0, " 3 ", "<answer> 3 </answer>", ["3"], "I <answer>3")] == [
        "3"
    ] * 7
    assert read_answer(0.5, None) == "0.5" and read_answer("$42$", None) == "$42$"
    assert read_answer("B", ("cat", "dog")) == "B" and read_answer(1, ("cat", "dog")) == "B"
    assert read_answer(1, ("2", "1")) == "1"  # a choice's text comes before a position
    for value, reason in (
        (None, "no answer"),
        ("", "no answer"),
        (float("nan"), "no answer"),
        ([1, 2], "several answers"),
    ):
        with pytest.raises(BadRow, match=reason):
            read_answer(value, None)
    with pytest.raises(BadRow, match="no position among 2"):
        read_answer(2, ("cat", "dog"))


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("", "no problem"),
        ("<image>", "no problem"),
        (["a", "b"], "no problem"),
        ("What is <|image_pad|>?", "reserved token"),
        ('[{"role": "user", "content": ', "message is not JSON"),
        ("Half of \ud83d", "broken text"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "not one question"),
        ([{"role": "wizard", "content": "a"}], "unknown role"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "unsupported content"),
    ],
)
def test_bad_problems(problem, reason):
    from apo_lora.data.formats import Columns

    columns = Columns("problem", "answer", None, None, None)
    with pytest.raises(BadRow, match=reason):
        read_row({"problem": problem, "answer": "1"}, columns)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_missing_empty_and_unknown_files(folder):
    (folder / "empty.jsonl").touch()
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "data.csv").write_text("a,b\n")
    (folder / "bad.parquet").write_bytes(b"nothing")
    (folder / "latin.jsonl").write_bytes(b'{"problem": "\xe9"}')
    (folder / "scalar.json").write_text("3")
    (folder / "hollow").mkdir()
    for name, message in {
        "none.jsonl": "no such file",
        "empty.jsonl": "is empty",
        "blank.jsonl": "holds no rows",
        "data.csv": "files ending in .csv are not read; use .jsonl, .json, .parquet",
        "bad.parquet": "cannot be read as Parquet",
        "latin.jsonl": "cannot be read as UTF-8",
        "scalar.json": "holds no list of rows",
        "hollow": "holds no .jsonl, .json, .parquet file for split 'train'",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            load(folder / name)
        assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


def test_invalid_json_names_its_lines(folder):
    path = folder / "data.jsonl"
    path.write_text('{"problem": "?", "answer": "1"}\n{"problem": \n' + "{\n" * 4)
    with pytest.raises(DataError) as caught:
        load(path)
    assert [problem.split(": ")[0] for problem in caught.value.problems[:3]] == [f"{path} line {n}" for n in (2, 3, 4)]
    assert caught.value.problems[3] == f"{path}: and 2 more lines like these"
    (folder / "data.json").write_text('[{"a": 1},]')
    with pytest.raises(DataError, match="data.json: not valid JSON .*line 1 column"):
        load(folder / "data.json")


def test_unrecognised_columns_name_the_keys_to_set(folder):
    path = write_jsonl(folder / "data.jsonl", [{"picture": "a.png", "ask": "?", "reply": "1"}])
    with pytest.raises(DataError) as caught:
        load(path)
    text = str(caught.value)
    assert "no column for the problem; set data.problem_column to one of: picture, ask, reply" in text
    assert "set data.answer_column" in text and "'picture' seems to hold images; set data.image_column" in text
    data = section(problem_column="ask", answer_column="reply", image_column="pictures")
    with pytest.raises(DataError, match="data.image_column: no column 'pictures' .*; found: picture, ask, reply"):
        load(path, data=data)


def test_a_few_bad_rows_are_dropped_and_counted(folder):
    good = {"image": "a.png", "problem": "?", "answer": "1"}
    bad = [{**good, "answer": "unparsable"}, {**good, "image": "none.png"}, {**good, "answer": None}, "text", {}]
    loaded = load(write_jsonl(folder / "data.jsonl", [good] * 6 + bad))
    assert [example.row for example in loaded.examples] == [1, 2, 3, 4, 5, 6]
    assert {reason: [row for row, _ in rows] for reason, rows in loaded.dropped.items()} == {
        "unparsable gold": [7],
        "image missing": [8],
        "no answer": [9],
        "not a mapping": [10],
        "no problem": [11],
    }
    assert loaded.summary() == (
        f"11 rows of {folder / 'data.jsonl'}; 5 dropped (1 unparsable gold: row 7; 1 image missing: row 8; "
        "1 no answer: row 9; 1 not a mapping: row 10; 1 no problem: row 11)"
    )


def test_mostly_bad_rows_are_refused(folder):
    good = {"image": "a.png", "problem": "?", "answer": "1"}
    path = write_jsonl(folder / "data.jsonl", [good, good] + [{**good, "image": f"{i}.png"} for i in range(4)])
    with pytest.raises(DataError) as caught:
        load(path)
    head, *rows = caught.value.problems
    assert head.startswith(
        f"{path}: 4 of 6 rows cannot be used (read problem from 'problem', answer from 'answer', image"
    )
    assert [row.split(": ")[0] for row in rows] == [f"{path} row {n}" for n in (3, 4, 5)]
    assert "image missing" in rows[0] and "0.png" in rows[0]
    assert len(load(path, limit=4).examples) == 2  # half is still accepted


def test_a_mark_without_an_image_is_a_bad_row(folder):
    rows = [{"image": "a.png", "problem": "<image>?", "answer": "1"}] * 2
    rows.append({"image": None, "problem": "<image>?", "answer": "1"})
    assert load(write_jsonl(folder / "data.jsonl", rows)).dropped == {
        "image missing": [(3, "1 <image> marks in the problem and 0 images")]
    }


# --- images ----------------------------------------------------------------------------------------------------------


def reason_of(value, folder) -> str:
    with pytest.raises(BadRow) as caught:
        image_refs(value, folder=folder, row=1)
    return caught.value.reason


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_paths_stay_inside_the_data_folder(folder, tmp_path):
    (tmp_path / "outside.png").write_bytes(png())
    for path in ("../outside.png", str(tmp_path / "outside.png"), "x/../../outside.png", "file:///etc/passwd"):
        assert reason_of(path, folder) == "image outside the data folder"
    for path in ("a.png", str(folder / "a.png"), f"file://{folder}/a.png", "x/../a.png"):
        assert image_refs(path, folder=folder, row=1)[0].open().size == (60, 30)
    os.symlink(tmp_path, folder / "linked")  # a data set from elsewhere may bring such a link
    assert reason_of("linked/outside.png", folder) == "image outside the data folder"
    (folder / "images").mkdir()
    (folder / "images" / "c.png").write_bytes(png("green"))
    assert image_refs("c.png", folder=folder, row=1)[0].open().getpixel((0, 0)) == (0, 128, 0)


def test_bad_images_have_their_reasons(folder, decodings):
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(png()[:20])
    (folder / "huge.png").write_bytes(header_only_png(30_000, 30_000))
    (folder / "large.png").write_bytes(header_only_png(10_000, 10_000))
    (folder / "none.png").write_bytes(header_only_png(0, 10))
    (folder / "thread.png").write_bytes(png(size=(402, 2)))
    reasons = {
        **dict.fromkeys(
            ("text.png", "empty.png", "cut.png", "none.png", "data:image/png;base64,%%"), "image unreadable"
        ),
        **dict.fromkeys(("huge.png", "large.png"), "image too large"),
        "thread.png": "image too narrow",
        "https://x.org/a.png": "image is a URL",
        "nothing.png": "image missing",
        ".": "image missing",
        "nul\0.png": "image missing",
        "../nul\0.png": "image missing",
        "long" * 2000: "image missing",
    }
    assert {path: reason_of(path, folder) for path in reasons} == reasons
    with pytest.raises(BadRow, match="image unreadable: row 8 image 2 .not an image."):
        image_refs([png(), b"bytes that are none"], folder=folder, row=8)
    assert reason_of(5, folder) == "image missing"
    assert decodings == []


def test_damaged_pixels_surface_as_a_data_error(folder):
    (folder / "cut.png").write_bytes(encoded(Image.effect_noise((200, 200), 50))[:5000])
    rows = [{"image": name, "problem": "?", "answer": "1"} for name in ("a.png", "cut.png", "b.png")]
    loaded = load(write_jsonl(folder / "data.jsonl", rows))
    assert len(loaded.examples) == 3  # the header is whole
    with pytest.raises(DataError, match="image cut.png: cannot be decoded"):
        loaded.examples[1].images[0].open()
    checked = drop_undecodable(loaded)
    assert [e.row for e in checked.examples] == [1, 3] and checked.dropped["image unreadable"][0][0] == 2
    assert loaded.dropped == {}


def test_every_mode_becomes_rgb():
    import numpy

    half_red = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    assert to_rgb(half_red).getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    assert to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    for dtype in (numpy.uint16, numpy.int32, numpy.float32):
        deep = Image.fromarray(numpy.array([[0, 32768, 65535]], dtype=dtype))
        assert [to_rgb(deep).getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    unit = Image.fromarray(numpy.array([[0.0, 1.0, float("nan")]], dtype=numpy.float32))
    assert [to_rgb(unit).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 0]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_rotated_images_are_measured_as_they_are_opened(form, decodings):
    exif = Image.Exif()
    exif[0x0112] = 6
    (image,) = image_refs(encoded(picture(size=(40, 20)), form, exif=exif), folder=None, row=1)
    assert image.size == (20, 40) and decodings == []
    assert image.open().size == (20, 40)


@pytest.mark.parametrize("form", data_images.IMAGE_FORMATS)
def test_accepted_formats(form):
    (image,) = image_refs(encoded(picture("white"), form), folder=None, row=1)
    assert image.open().getpixel((0, 0)) == (255, 255, 255)


def test_other_formats_are_refused():
    with pytest.raises(BadRow, match="not an image"):  # its decoder would start Ghostscript
        image_refs(encoded(picture(), "EPS"), folder=None, row=1)


def test_first_frame_of_an_animation():
    frames = [picture(color, size=(8, 8)) for color in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert image_refs(moving, folder=None, row=1)[0].open().getpixel((0, 0)) == (255, 0, 0)


def test_loading_decodes_nothing(folder, decodings):
    rows = [{"image": ["a.png", "b.png"], "problem": "?", "answer": "1"}] * 50
    loaded = load(write_jsonl(folder / "data.jsonl", rows))
    assert len(loaded.examples) == 50 and decodings == []
    assert all(isinstance(image.source, Path) for example in loaded.examples for image in example.images)
    loaded.examples[0].images[0].open()
    assert len(decodings) == 1  # the counter counts


# --- what TRL is given -----------------------------------------------------------------------------------------------


def test_items_decode_each_image_once(folder, decodings):
    rows = [{"image": f"{name}.png", "problem": name, "answer": "1", "choices": ["1", "2"]} for name in "abab"]
    examples = load(write_jsonl(folder / "data.jsonl", rows)).examples
    dataset = prompt_dataset(examples, section(instruction="I"))
    assert dataset.column_names == ["index"] and len(dataset) == 4 and decodings == []

    group = dataset.__getitems__([2, 2, 2, 1, 1, 1])  # as a data loader asks
    assert len(decodings) == 2
    assert [item["index"] for item in group] == [2, 2, 2, 1, 1, 1]
    assert group[0]["images"][0].size == (60, 30) and group[5]["images"][0].size == (20, 40)
    assert group[0]["images"][0].mode == "RGB"
    assert group[0]["answer"] == "1" and group[0]["choices"] == ["1", "2"] and group[0]["category"] is None
    assert group[0]["prompt"] == examples[2].messages(section(instruction="I"))
    dataset.__getitems__([2, 2, 1])  # the next step of the same rollout
    assert len(decodings) == 2
    assert dataset[0]["index"] == 0 and len(decodings) == 3
    assert [item["index"] for item in dataset.select([3, 1])] == [3, 1]


def test_copies_of_a_dataset_share_the_examples():
    large = ImageRef("i", (500, 500), picture(size=(500, 500)))
    assert len(pickle.dumps(large.source)) > 500_000
    dataset = prompt_dataset([Example(1, "Why?", "x", None, (large,))] * 3, section())
    # `datasets` pickles the transform to hash it, at every step like these.
    assert sorted(item["index"] for item in copy.deepcopy(dataset).shuffle(seed=0).select([0, 1, 2])) == [0, 1, 2]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled)[2]["images"][0].size == (500, 500)


def test_items_do_not_share_what_a_trainer_could_write_into(folder):
    examples = load(write_jsonl(folder / "data.jsonl", [{"image": "a.png", "problem": "?", "answer": "1"}])).examples
    first, second = prompt_dataset(examples, section()).__getitems__([0, 0])
    first["prompt"][0]["content"][0]["image"] = "x"
    first["images"].clear()
    assert "image" not in second["prompt"][0]["content"][0] and len(second["images"]) == 1


def test_text_only_data_and_the_refusal_of_a_mixture(folder):
    with_image, without = example_of("?", 1), example_of("?", 0)
    assert "images" not in prompt_dataset([without, without], section())[0]
    with pytest.raises(DataError, match="1 of 2 examples have no image .row 1.; .* separate runs"):
        prompt_dataset([with_image, without], section())


@pytest.fixture(params=list(PROCESSORS))
def processor(request):
    if not PROCESSORS[request.param].is_dir():
        pytest.skip(f"no {PROCESSORS[request.param]}")
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(PROCESSORS[request.param])


@pytest.mark.parametrize("limits", [None, (28 * 28, 12 * 28 * 28)])
def test_counted_tokens_are_those_of_the_processor(processor, limits):
    from trl.data_utils import prepare_multimodal_messages

    if limits:
        processor.image_processor.size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    examples = [
        Example(1, "Is <image> odd?", "x", ("yes", "no"), (ImageRef("i", size, picture(size=size)),)) for size in SIZES
    ]
    examples.append(Example(1, "Are <image> and these?", "x", None, tuple(e.images[0] for e in examples[:3])))
    data = section(system_prompt="Think.", instruction="Answer in <answer> tags.")
    counted = prompt_lengths(examples, processor, data)
    assert len(set(counted)) > 2

    # The way of TRL's GRPOTrainer, for the whole batch.
    items = prompt_dataset(examples, data).__getitems__(list(range(len(examples))))
    prompts = [prepare_multimodal_messages(item["prompt"], images=item["images"]) for item in items]
    tokenized = processor.apply_chat_template(
        conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert counted == [len(ids) for ids in tokenized["input_ids"]]
    texts = processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[item["images"] for item in items], text=texts, padding=True, return_tensors="pt")
    assert counted == inputs["attention_mask"].sum(dim=1).tolist()


def test_text_only_tokens(processor):
    data = section()
    text = processor.apply_chat_template(example_of("Why?").messages(data), add_generation_prompt=True, tokenize=False)
    assert prompt_lengths([example_of("Why?")], processor, data) == [len(processor(text=[text])["input_ids"][0])]
    assert prompt_lengths([], processor, data) == []


def test_long_prompts_are_dropped_and_counted(processor, decodings):
    short, long = example_of("Why?"), Example(7, "Why not? " * 50, "x", None, ())
    loaded = Loaded("here", [short, long], {"no answer": [(3, "empty")]}, 3)
    data = section(max_prompt_tokens=prompt_lengths([short], processor, section())[0])
    kept = drop_long_prompts(loaded, processor, data)
    assert kept.examples == [short]
    assert [row for row, _ in kept.dropped["prompt too long"]] == [7] and kept.dropped["no answer"] == [(3, "empty")]
    assert "1 prompt too long: row 7" in kept.summary()
    assert "prompt too long" not in loaded.dropped
    with pytest.raises(DataError, match="every prompt is over data.max_prompt_tokens = 1 .*lower data.max_pixels"):
        drop_long_prompts(loaded, processor, section(max_prompt_tokens=1))
    assert decodings == []


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "num_rows"), [("puzzlevqa", 908), ("geometry3k_examples", 10)])
def test_shared_data_sets_load_whole(name, num_rows, decodings):
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {SHARED / name}")
    loaded = load_examples(str(SHARED / name), section(), split="train")  # with the real verifier
    assert (loaded.num_rows, loaded.dropped, decodings) == (num_rows, {}, [])
    assert all(example.choices and len(example.images) == 1 for example in loaded.examples)
    assert content(loaded.examples[0])[1].count("\nA. ") == 1


def test_training_order_is_whole_epochs_and_longer_runs_begin_alike():
    from apo_lora.data.examples import training_order

    order = training_order(5, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4] and len(order) == 12
    assert order[:5] != order[5:10]
    assert training_order(5, 30, seed=1)[:12] == order
    assert training_order(5, 12, seed=2) != order
