"""Data sets of every format, built on the spot: rows, problems, answers, choices."""

import base64
import json

import pytest
from data_sets import content, example_of, load, only, png, section, write_jsonl

from apo_lora.data import images as data_images
from apo_lora.data.choices import choice_lines
from apo_lora.errors import DataError


def asked(content):
    return {"role": "user", "content": content}


def answered(content):
    return {"role": "assistant", "content": content}


PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How many?"}]
FROM_ARROW = [{"type": "image", "text": None, "image": None}, {"type": "text", "text": "How many?", "image": None}]
OPENAI = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "How many?"}]
LLAVA = [{"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": 3}]
URI = "data:image/png;base64," + base64.b64encode(png()).decode()
MARKED, TAGGED = asked("<image>How many?"), "<answer> 3 </answer>"


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "problem": "How many?", "answer": "3"},
        {"images": ["a.png"], "question": "How many?", "solution": TAGGED},
        {"img": {"path": "a.png", "bytes": None}, "query": "How many?", "label": 3},
        {"image_path": "./a.png", "prompt": "How many?", "gold": 3.0, "answer": None},
        {"file_name": "a.png", "text": "<image>How many?", "target": ["3"]},
        {"message": [asked([PARTS[0], "How many?"])], "answer": "3"},
        {"message": json.dumps([asked(PARTS)]), "answer": "3"},
        {"id": 1, "image": "a.png", "conversations": LLAVA},
        {"messages": [MARKED, answered("no")], "images": ["a.png"], "solution": TAGGED},
        {"messages": [MARKED, answered(TAGGED)], "images": [{"path": "a.png"}]},
        {"prompt": [asked(FROM_ARROW)], "images": ["a.png"], "reward_model": {"style": "rule", "ground_truth": "3"}},
        {"messages": [asked(OPENAI)], "answer": 3},
        {"image": URI, "problem": "How many?", "answer": "3"},
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
    named = {"image": "pic", "problem": "ask", "answer": "meta.gold", "choices": "opts"}
    example = only(load(write_jsonl(folder / "data.jsonl", [row]), data=section(columns=named)))
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
    with pytest.raises(DataError, match="no split 'validation'; it has test, train; set data.split or data.eval_split"):
        load(folder, split="validation")

    saved = datasets.Dataset.from_list([{"image": {"bytes": png(), "path": None}, "problem": "?", "answer": "saved"}])
    saved.save_to_disk(folder / "saved")
    assert only(load(folder / "saved")).answer == "saved"
    datasets.DatasetDict(test=saved).save_to_disk(folder / "dict")
    assert only(load(folder / "dict", split="test")).answer == "saved"
    with pytest.raises(DataError, match="no split 'train'; it has test"):
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
    loaded = load("boards")
    assert loaded.summary() == "2048 rows of boards (train); none dropped"


# --- problem, answer, choices ----------------------------------------------------------------------------------------


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
