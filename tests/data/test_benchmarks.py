"""The paper's benchmarks, read from files with the schema that each of them has on the Hub."""

import data_sets
import datasets
import pytest

from apo_lora.data.benchmarks import BENCHMARKS, find_benchmark
from apo_lora.data.examples import load_examples
from apo_lora.errors import DataError
from apo_lora.recipe.schema import DataSection
from apo_lora.rewards.scores import accuracy_reward

TEXT, PICTURE = datasets.Value("string"), datasets.Image()


def png(color="red"):
    return {"bytes": data_sets.png(color), "path": None}


# Features as on the data sets' cards; rows in the manner of theirs, written for this test.
SCHEMAS = {
    "mathvista": {
        "pid": TEXT, "question": TEXT, "image": TEXT, "decoded_image": PICTURE, "choices": datasets.Sequence(TEXT),
        "unit": TEXT, "precision": datasets.Value("float64"), "answer": TEXT, "question_type": TEXT,
        "answer_type": TEXT, "metadata": {"category": TEXT, "task": TEXT, "skills": datasets.Sequence(TEXT)},
        "query": TEXT,
    },
    "mathverse": {
        "sample_index": TEXT, "problem_index": TEXT, "problem_version": TEXT, "question": TEXT, "image": PICTURE,
        "answer": TEXT, "question_type": TEXT, "metadata": {"split": TEXT, "source": TEXT, "subject": TEXT},
        "query_wo": TEXT, "query_cot": TEXT, "question_for_eval": TEXT,
    },
    "mmk12": {"id": TEXT, "question": TEXT, "answer": TEXT, "subject": TEXT, "image": PICTURE},
    "mmstar": {
        "index": datasets.Value("int64"), "question": TEXT, "image": PICTURE, "answer": TEXT, "category": TEXT,
        "l2_category": TEXT, "meta_info": {"source": TEXT, "split": TEXT, "image_path": TEXT},
    },
    "mmmu": {
        "id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT,
        **{f"image_{i}": PICTURE for i in range(1, 8)}, "img_type": TEXT, "answer": TEXT, "topic_difficulty": TEXT,
        "question_type": TEXT, "subfield": TEXT,
    },
}  # fmt: skip


def table(name, rows):
    features = datasets.Features(SCHEMAS[name])
    columns = {column: [row.get(column) for row in rows] for column in features}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def load(tmp_path):
    """Writes rows as Parquet with the benchmark's schema and loads them as `--data NAME:FILE` does."""

    def load(name, *rows, **recipe):
        path = tmp_path / f"{name}.parquet"
        table(name, rows).to_parquet(path)
        return load_examples(f"{name}:{path}", DataSection(train="unused", **recipe), split="train")

    return load


def shown(example):
    """The prompt as text, an image as [image]."""
    parts = example.messages(DataSection(train="unused"))[-1]["content"]
    return "".join("[image]" if part["type"] == "image" else part["text"] for part in parts)


def verdicts(example, *answers):
    return [accuracy_reward(f"<answer>{a}</answer>", example.answer, example.choices) for a in answers]


def test_mathvista(load):
    picture = {"image": "images/1.jpg", "decoded_image": png()}
    loaded = load(
        "mathvista",
        {**picture, "question": "What is BC?", "choices": ["6", "7", "8"], "answer": "8", "answer_type": "text",
         "question_type": "multi_choice", "metadata": {"task": "geometry problem solving"}},
        {**picture, "question": "How far?", "unit": "cm", "precision": 1.0, "answer": "1.2", "answer_type": "float",
         "question_type": "free_form", "metadata": {"task": "figure question answering"}},
        {**picture, "question": "Which years?", "precision": None, "answer": "[2003, 2005]", "answer_type": "list",
         "question_type": "free_form", "metadata": {"task": "figure question answering"}},
        image_column="nothing",  # the recipe's names are for its own data
    )  # fmt: skip
    choice, number, years = loaded.examples
    assert shown(choice) == "[image]What is BC?\nA. 6\nB. 7\nC. 8" and choice.category == "geometry problem solving"
    assert verdicts(choice, "C", "8", "A", "7") == [1, 1, 0, 0]
    assert shown(number) == "[image]How far? (Unit: cm)\nGive the answer as a number with 1 decimal place."
    assert verdicts(number, "1.2", "1.2 cm", "1.3") == [1, 1, 0]
    assert "list" in shown(years) and verdicts(years, "[2003, 2005]", "2003") == [1, 0]
    assert choice.images[0].open().getpixel((0, 0)) == (255, 0, 0) and choice.images[0].path is None


def test_mathverse(load):
    common = {"image": png(), "question_type": "multi-choice", "answer": "B"}
    lettered = "As shown, find angle C.\nChoices:\nA:50°\nB:60°\nC:140°\nD:80°"
    loaded = load(
        "mathverse",
        {**common, "question": lettered, "problem_version": "Text Dominant", "query_wo": "unused"},
        {**common, "question": "", "problem_version": "Vision Only", "query_wo": "According to the question shown ..."},
        {**common, "question": "Find x.", "question_type": "free-form", "answer": "5", "problem_version": "Text Lite"},
    )
    listed, in_picture, free = loaded.examples
    assert shown(listed) == f"[image]{lettered}"  # the choices are there already
    assert verdicts(listed, "B", "60°", "A", "80°") == [1, 1, 0, 0]
    assert shown(in_picture) == "[image]According to the question shown ..." and in_picture.category == "Vision Only"
    assert verdicts(in_picture, "B", "(B)", "C") == [1, 1, 0]
    assert free.choices is None and verdicts(free, "5", "x = 5", "6") == [1, 1, 0]


def test_mmk12(load):
    question = "What is the force?\nA. $2\\,N$\nB. $3\\,N$\nC. $4\\,N$\nD. none"
    loaded = load(
        "mmk12",
        {"id": "1", "question": question, "answer": "C", "subject": "physics", "image": png()},
        {"id": "2", "question": "At which point?\nA. one\nC. three", "answer": "C", "subject": "math", "image": png()},
    )
    first, odd = loaded.examples
    assert shown(first) == f"[image]{question}" and first.category == "physics"
    assert verdicts(first, "C", "4 N", "A") == [1, 1, 0]
    assert odd.choices is None and verdicts(odd, "C", "A") == [1, 0]  # its letters skip one: read as they stand


def test_mmstar(load):
    question = "Which is it?\nOptions: A: The case is on the book., B: The case, is under it., C: Neither, D: Both"
    loaded = load("mmstar", {"question": question, "answer": "B", "category": "coarse perception", "image": png()})
    (example,) = loaded.examples
    assert shown(example) == f"[image]{question}" and example.category == "coarse perception"
    assert example.choices == ("The case is on the book.", "The case, is under it.", "Neither", "Both")
    assert verdicts(example, "B", "the case, is under it", "Neither") == [1, 1, 0]


def test_mmmu_pictures_and_options(load):
    common = {"question_type": "multiple-choice", "answer": "B"}
    loaded = load(
        "mmmu",
        {**common, "id": "validation_Art_Theory_1", "question": "Compare <image 1> and <image 2>. Is <image 1> older?",
         "options": "['Yes, it\\'s older', \"No\"]", "image_1": png("red"), "image_2": png("blue")},
        {**common, "id": "validation_Math_2", "question": "Which graph fits <image 1>?",
         "options": "['<image 2>', '<image 3>']", "image_1": png("red"), "image_2": png("lime"),
         "image_3": png("blue")},
        {"id": "validation_Math_3", "question": "<image 1> How many?", "options": "[]", "question_type": "open",
         "answer": "12", "image_1": png()},
        {"id": "validation_Math_4", "question": "How many?", "options": "[]", "question_type": "open", "answer": "3",
         "image_1": png()},
    )  # fmt: skip
    both, graphs, open_question, unmarked = loaded.examples
    assert shown(both) == "Compare [image] and [image]. Is image 1 older?\nA. Yes, it's older\nB. No"
    assert [image.open().getpixel((0, 0)) for image in both.images] == [(255, 0, 0), (0, 0, 255)]
    assert both.category == "Art_Theory" and verdicts(both, "B", "No", "A") == [1, 1, 0]
    assert shown(graphs) == "Which graph fits [image]?\nA. [image]\nB. [image]"
    colors = [image.open().getpixel((0, 0)) for image in graphs.images]
    assert colors == [(255, 0, 0), (0, 255, 0), (0, 0, 255)] and verdicts(graphs, "B", "A") == [1, 0]
    assert open_question.choices is None and verdicts(open_question, "12", "13") == [1, 0]
    assert shown(unmarked) == "[image]How many?"


def test_mmmu_rows_that_cannot_be_judged_are_counted(load):
    good = {"id": "validation_Math_1", "question": "<image 1> How many?", "options": "[]", "answer": "1",
            "image_1": png()}  # fmt: skip
    loaded = load(
        "mmmu",
        *[good] * 4,
        {**good, "answer": "['1', 'one']"},
        {**good, "question": "<image 1> and <image 3>?"},
        {**good, "options": "['a', 'b"},
    )
    assert [example.answer for example in loaded.examples] == ["1"] * 4 + [("1", "one")]
    assert verdicts(loaded.examples[4], "1", "one", "2") == [1, 1, 0]
    reasons = {reason: [row for row, _ in rows] for reason, rows in loaded.dropped.items()}
    assert reasons == {"image missing": [6], "choices unreadable": [7]}


def test_options_are_literals_and_never_run(load, tmp_path):
    target = tmp_path / "made"
    good = {"id": "validation_Math_1", "question": "?", "options": "['a', 'b']", "answer": "A", "image_1": png()}
    loaded = load("mmmu", good, {**good, "options": f"[open({str(target)!r}, 'w')]"})
    assert "choices unreadable" in loaded.dropped and not target.exists()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_is_asked_for_the_right_thing(name, monkeypatch):
    asked, benchmark = [], BENCHMARKS[name]
    picture = {column: png() for column in ("image", "decoded_image", "image_1") if column in SCHEMAS[name]}
    if name == "mathvista":
        picture["image"] = "images/1.jpg"
    row = {"id": "validation_Math_1", "question": "What is it?", "options": "['a', 'b']", "answer": "A", **picture}
    rows = table(name, [row] * 2)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: asked.append((args, keys)) or rows)
    loaded = load_examples(name, DataSection(train="unused"), split="whatever")
    assert asked == [((benchmark.hub_id, part), {"split": benchmark.split}) for part in benchmark.configs]
    assert [example.row for example in loaded.examples] == list(range(1, 2 * len(benchmark.configs) + 1))
    assert benchmark.title in loaded.summary() and not loaded.dropped
    asked.clear()
    limited = load_examples(name, DataSection(train="unused"), split="x", limit=3)
    assert len(limited.examples) == min(3, 2 * len(benchmark.configs))
    assert len(asked) == min(2, len(benchmark.configs))


def test_another_schema_is_one_line(tmp_path):
    path = tmp_path / "other.parquet"
    table("mmstar", [{"question": "?", "image": png(), "answer": "A"}]).to_parquet(path)
    with pytest.raises(
        DataError, match="does not have the schema of MathVista: no column decoded_image \(found: index, quest"
    ):
        load_examples(f"mathvista:{path}", DataSection(train="unused"), split="train")
    with pytest.raises(DataError, match="no such file"):
        load_examples("mathvista:nowhere.parquet", DataSection(train="unused"), split="train")


def test_names():
    assert find_benchmark("mmmu") == (BENCHMARKS["mmmu"], None)
    assert find_benchmark("mmmu:a/b.parquet") == (BENCHMARKS["mmmu"], "a/b.parquet")
    assert find_benchmark("boards") is None and find_benchmark("AI4Math/MathVista") is None
    assert len(BENCHMARKS["mmmu"].configs) == 30
