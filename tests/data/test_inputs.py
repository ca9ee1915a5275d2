"""The same rows survive wherever a recipe's inputs are opened: each verb says what it saw of one spoilt data set."""

import re

import pytest
from data_sets import png, write_jsonl

from apo_lora.commands.main import main
from apo_lora.data.inputs import held_out_sets, open_inputs, require_trainable
from apo_lora.errors import DataError
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl, write_atomically

LONG = "word " * 400
GOOD_ROWS, LONG_ROWS, UNGRADABLE, DAMAGED = (1, 2, 3, 4), (5, 6, 7, 8), 9, 10
DROPPED = "10 rows of .*data.jsonl; 6 dropped "
DROPPED += r"\(1 unparsable gold: row 9; 1 image unreadable: row 10; 4 prompt too long: rows 5, 6, 7, 8\)"


@pytest.fixture
def spoilt(folder):
    """Four rows to keep; four too long, which is most of what is left after an answer of nothing and half a picture."""
    (folder / "cut.png").write_bytes(png(size=(300, 300))[:200])
    good = {"problem": "How many?", "answer": "3", "image": "a.png"}
    rows = [good] * 4 + [{**good, "problem": LONG}] * 4 + [{**good, "answer": "$"}, {**good, "image": "cut.png"}]
    return write_jsonl(folder / "data.jsonl", rows)


@pytest.fixture
def overrides(spoilt, tmp_path):
    sets = [f"data.{key}={spoilt}" for key in ("train", "eval")]
    small = [
        "grpo.prompts_per_step=2",
        "grpo.completions_per_pass=2",
        "grpo.max_completion_length=4",
        "data.general=null",
        f"output.dir={tmp_path}/out",
    ]
    return [*sets, *small, "data.max_prompt_tokens=300"]


def test_training_and_both_checks(overrides, capsys):
    for verb in (["train", "--dry-run"], ["check-rewards"]):
        assert main([*verb, "--recipe", "tiny_cpu", *overrides]) == 0
        assert re.search(DROPPED, capsys.readouterr().out)
    assert main(["check-data", "--recipe", "tiny_cpu", *overrides]) == 0
    shown = capsys.readouterr().out
    assert "10 (4 usable, 6 dropped)" in shown
    assert [int(n) for n in re.findall(r"dropped row (\d+):", shown)] == [*LONG_ROWS, UNGRADABLE, DAMAGED]


def test_evaluation(overrides, tmp_path, capsys):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    write_atomically(run.recipe, load_recipe(find_recipe("tiny_cpu"), overrides).to_yaml())
    assert main(["eval", str(run.path), "--base"]) == 0
    assert re.search(DROPPED, capsys.readouterr().out)
    answers = read_jsonl(run.evaluations / "held_out" / "answers.jsonl")
    assert tuple(row["row"] for row in answers) == GOOD_ROWS


def test_what_is_opened_is_a_parameter(overrides):
    recipe = load_recipe(find_recipe("tiny_cpu"), overrides)
    both = open_inputs(recipe)
    assert both.held_out.keys() == {"reasoning"} and len(both.train.examples) == 8  # no prompt is counted yet
    assert open_inputs(recipe, train=False).train is None and open_inputs(recipe, held_out={}).held_out == {}
    without = load_recipe(find_recipe("tiny_cpu"), [*overrides, "train.evaluate=false"])
    assert open_inputs(without).held_out == {} and held_out_sets(without).keys() == {"reasoning"}


@pytest.mark.parametrize(("image", "prompts", "says"), [("a.png", 5, "a rollout needs 5"), (None, 2, "have no image")])
def test_too_few_rows_and_a_mixture_cannot_be_trained_on(image, prompts, says, overrides, spoilt):
    good = {"problem": "How many?", "answer": "3", "image": "a.png"}
    write_jsonl(spoilt, [good] * 3 + [{**good, "image": image}])
    recipe = load_recipe(find_recipe("tiny_cpu"), [*overrides, f"grpo.prompts_per_step={prompts}"])
    with pytest.raises(DataError, match=says):
        require_trainable(open_inputs(recipe), recipe)


@pytest.mark.parametrize("image", ["b.png", "copy.png"])
def test_held_out_rows_that_are_trained_on_are_named(image, tmp_path, capsys):
    for name, color in (("a.png", "red"), ("b.png", "blue"), ("copy.png", "red")):
        (tmp_path / name).write_bytes(png(color))
    row = {"problem": "Which color?", "answer": "3", "image": "a.png"}
    train = write_jsonl(tmp_path / "train.jsonl", [row, {**row, "problem": "And this?"}])
    said_otherwise = {"problem": " which  color?", "answer": "three", "image": image}
    others = [{**row, "problem": "What else?"}, said_otherwise, {**row, "problem": "Which one?"}]
    held_out = write_jsonl(tmp_path / "other.jsonl", others)
    small = [f"data.train={train}", f"data.eval={held_out}", "data.general=null", f"output.dir={tmp_path}/out"]
    small += ["grpo.prompts_per_step=2", "grpo.completions_per_pass=2"]
    assert main(["train", "--dry-run", "--recipe", "tiny_cpu", *small]) == 0
    warning = f"warning: {held_out}: 1 of 3 held-out rows are also in data.train (row 2); set data.eval"
    assert (warning in capsys.readouterr().out) == (image == "copy.png")
