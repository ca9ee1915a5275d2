"""Rows with the columns of well-known data sets, in words of our own: what a reader of the set would call right is."""

import pytest
from data_sets import load, png, section

from apo_lora.rewards.scores import accuracy_reward

FIVE = ["kite", "drum", "lamp", "boat", "fork"]
ARC = {"text": FIVE[:4], "label": ["A", "B", "C", "D"]}
MMBENCH = dict(zip("ABCD", FIVE[:4], strict=True))
TURNS = [{"role": "user", "content": "<image>How many?"}]

# name -> (row, what is right, what is wrong), each of two rows; `image` stands for a picture.
SCHEMAS = {
    "ScienceQA": [
        ({"question": "Which?", "choices": FIVE[:2], "answer": 0, "image": None, "hint": ""}, "kite", "drum"),
        ({"question": "Which?", "choices": ["2", "1"], "answer": 1, "image": None, "hint": ""}, "1", "2"),
    ],
    "ARC": [
        ({"question": "Which?", "choices": ARC, "answerKey": "B"}, "drum", "kite"),
        ({"question": "Which?", "choices": {"text": ["8", "9"], "label": ["1", "2"]}, "answerKey": "1"}, "8", "9"),
    ],
    "OpenBookQA": [({"question_stem": "Which?", "choices": ARC, "answerKey": key}, key, "A") for key in "DC"],
    "HellaSwag": [
        ({"ctx": "Then", "endings": FIVE[:4], "label": "3"}, "boat", "lamp"),
        ({"ctx": "Then", "endings": FIVE[:4], "label": "0"}, "kite", "drum"),
    ],
    "PIQA": [
        ({"goal": "Fly", "sol1": "a kite", "sol2": "a drum", "label": 0}, "a kite", "B"),
        ({"goal": "Beat", "sol1": "a kite", "sol2": "a drum", "label": 1}, "a drum", "A"),
    ],
    "WinoGrande": [
        ({"sentence": "_ flies", "option1": "kite", "option2": "drum", "answer": "1"}, "kite", "drum"),
        ({"sentence": "_ sounds", "option1": "kite", "option2": "drum", "answer": "2"}, "drum", "kite"),
    ],
    "MedMCQA": [
        ({"question": "Which?", "opa": "kite", "opb": "drum", "opc": "lamp", "opd": "boat", "cop": 0}, "kite", "B"),
        ({"question": "Which?", "opa": "kite", "opb": "drum", "opc": "lamp", "opd": "boat", "cop": 2}, "lamp", "B"),
    ],
    "MathQA": [
        ({"Problem": "How much?", "options": "a ) 3.5 , b ) 9 , c ) 12", "correct": "b"}, "9", "12"),
        ({"Problem": "How much?", "options": "a ) 7 , b ) 9 , c ) 12", "correct": "c"}, "12", "7"),
    ],
    "MMBench": [
        ({"question": "Which?", **MMBENCH, "answer": "C", "image": "base64"}, "lamp", "boat"),
        ({"question": "Which?", **MMBENCH, "C": None, "D": None, "answer": "B", "image": "base64"}, "drum", "kite"),
    ],
    "MMMU-Pro": [
        ({"question": "<image 1> Which?", "options": str(FIVE), "answer": "E", "image_1": "png"}, "fork", "boat"),
        ({"question": "Which? <image 1>", "options": str(FIVE), "answer": "A", "image_1": "png"}, "kite", "drum"),
    ],
    "We-Math": [
        ({"question": "Which?", "option": "A. 6cm; B. 9cm; C. None", "answer": "B", "image_path": "png"}, "9cm", "6cm"),
        ({"question": "Which?", "option": "A. 2; B. 4; C. None", "answer": "A", "image_path": "png"}, "2", "4"),
    ],
    "OlympiadBench": [
        ({"question": "Find n.", "solution": ["long " * 90], "final_answer": ["12"], "image_1": "png"}, "12", "13"),
        ({"question": "Find n.", "solution": ["long " * 90], "final_answer": ["$4$"], "image_1": "png"}, "4", "12"),
    ],
    "TextVQA": [
        ({"question": "What is said?", "answers": ["STOP", "stop sign"], "image": "png"}, "stop", "go"),
        ({"question": "What is said?", "answers": ["go", "go", "go!"], "image": "png"}, "go", "stop"),
    ],
    "ViRL39K": [
        ({"question": "<image>How many?", "answer": "\\boxed{4}", "image": ["png"], "category": "x"}, "4", "5"),
        ({"question": "<image>Which? A. 4 B. 5", "answer": "\\boxed{B}", "image": ["png"], "category": "x"}, "B", "A"),
    ],
    "EasyR1": [({"problem": "<image>Find x.", "answer": answer, "images": ["png"]}, answer, "9") for answer in "48"],
    "verl": [
        ({"prompt": TURNS, "images": ["png"], "reward_model": {"ground_truth": answer}}, answer, "9") for answer in "48"
    ],
}
PROBLEM = {"HellaSwag": "ctx", "PIQA": "goal", "WinoGrande": "sentence"}
ANSWER = {"MathQA": "correct"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_rows_of_the_schema_are_read_rightly(name, tmp_path):
    import base64

    import pandas

    pictures = {"png": {"bytes": png(), "path": None}, "base64": base64.b64encode(png()).decode()}

    def with_pictures(value):
        if isinstance(value, list) and value == ["png"]:
            return [pictures["png"]]
        return pictures.get(value, value) if isinstance(value, str) else value

    rows = [{key: with_pictures(value) for key, value in row.items()} for row, _, _ in SCHEMAS[name]]
    pandas.DataFrame(rows).to_parquet(tmp_path / "data.parquet")
    named = section(columns={"problem": PROBLEM.get(name), "answer": ANSWER.get(name)})
    loaded = load(tmp_path / "data.parquet", data=named)
    assert loaded.dropped == {} and len(loaded.examples) == 2
    for example, (row, right, wrong) in zip(loaded.examples, SCHEMAS[name], strict=True):
        said = [accuracy_reward(f"<answer>{text}</answer>", example.answer, example.choices) for text in (right, wrong)]
        assert said == [1.0, 0.0], (example.answer, example.choices)
        assert len(example.images) == ("png" in str(row.values()) or "base64" in str(row.values()))
