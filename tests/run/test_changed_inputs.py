"""A continued run has the rows, pictures and rewards that it began with, or says so."""

import pytest

from apo_lora.data.examples import Example, Loaded
from apo_lora.data.images import ImageRef
from apo_lora.errors import RunDirError
from apo_lora.rewards.plugins import load_reward
from apo_lora.run.directory import RunDir
from apo_lora.run.files import write_json
from apo_lora.run.inputs import changes_of_inputs, inputs_of


def example(row, answer="4", picture=None):
    images = (ImageRef(picture.name, (8, 8), picture),) if picture else ()
    return Example(row, f"Problem {row}?", answer, None, images)


def record(*examples, held_out=(), rewards=("accuracy",)):
    return inputs_of(Loaded("rows", list(examples), {}, len(examples)), {"reasoning": list(held_out)}, rewards)


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_the_same_inputs_go_on_without_a_word(run):
    write_json(run.inputs, record(example(1), held_out=[example(1)]))
    assert changes_of_inputs(run, record(example(1), held_out=[example(1)])) == []


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (record(example(1), example(2)), "data.train: 1 rows until now, 2 now"),
        (record(example(1, answer="5")), "data.train: 1 rows until now, 1 now, with other contents"),
        (record(example(1), held_out=[example(3)]), "reasoning: 0 rows until now, 1 now"),
    ],
)
def test_other_rows_are_refused(run, now, says):
    write_json(run.inputs, record(example(1)))
    with pytest.raises(RunDirError) as error:
        changes_of_inputs(run, now)
    assert error.value.problems[1:] == (says,) and "inputs.json" in error.value.problems[0]


def test_another_picture_is_another_row(run, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"12345")
    write_json(run.inputs, record(example(1, picture=picture)))
    picture.write_bytes(b"123456")
    with pytest.raises(RunDirError, match="with other contents"):
        changes_of_inputs(run, record(example(1, picture=picture)))


def test_what_is_not_measured_this_time_is_not_compared(run):
    write_json(run.inputs, record(example(1), held_out=[example(1)]))
    now = inputs_of(Loaded("rows", [example(1)], {}, 1), {}, ())
    assert changes_of_inputs(run, now) == []


def test_other_code_of_a_reward_is_said(run, tmp_path):
    """A reward that failed at some step is mended, and the run goes on."""
    file, name = tmp_path / "scores_of_run.py", f"{tmp_path}/scores_of_run.py:f"
    file.write_text("def f(completions, **columns):\n    return [0] * len(completions)\n")
    load_reward(name)
    write_json(run.inputs, record(example(1), rewards=("accuracy", name)))
    file.write_text("def f(completions, **columns):\n    return [1] * len(completions)\n")
    (line,) = changes_of_inputs(run, record(example(1), rewards=("accuracy", name)))
    assert line.startswith("Changed since the run started: the code of ") and name in line


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_a_run_without_a_readable_record_of_them_goes_on(run, content):
    run.inputs.write_text(content)
    assert changes_of_inputs(run, record(example(1))) == []
