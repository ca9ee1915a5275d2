"""Runs that are continued: damaged checkpoints, another recipe, another place, saves by the clock, orderly stops."""

import json
import os
import shutil
import signal
import time

import pytest
from forks import Forked

from apo_lora.commands.main import main
from apo_lora.recipe.files import load_recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl, locked, write_json
from apo_lora.run.resume import checkpoint_to_continue, environment_changes

from .tiny_runs import arguments, differences

NOW = {"processes": 1, "engine": "transformers", "gpu": None, "packages": {"torch": "2.10.0", "trl": "1.15.0"}}


# --- the place -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ({}, None),
        ({"processes": 2}, "processes from 2 to 1"),
        ({"engine": "unsloth"}, "engine from unsloth to transformers"),
        ({"gpu": {"name": "T4"}}, "device from T4 to CPU"),
        ({"packages": {"torch": "2.9.0", "trl": "1.15.0"}}, "torch from 2.9.0 to 2.10.0"),
        ({"packages": {"torch": "2.10.0", "xformers": "1"}}, "xformers from 1 to none"),
        ({"packages": {}}, None),  # recorded by a version that did not look
    ],
)
def test_what_changed_around_a_run_is_said(tmp_path, before, words):
    run = RunDir(tmp_path)
    write_json(run.environment, NOW | before)
    lines = list(environment_changes(run, NOW))
    assert len(lines) == (words is not None) and all(
        line.startswith("Changed since the run started: ") for line in lines
    )
    if words:
        assert words in lines[0]


def test_a_run_without_a_record_of_its_place_goes_on(tmp_path):
    assert list(environment_changes(RunDir(tmp_path), NOW)) == []


def test_a_record_ahead_of_all_checkpoints_is_not_thrown_away(tmp_path):
    from apo_lora.errors import RunDirError
    from apo_lora.recipe.schema import Recipe

    run, recipe = RunDir(tmp_path / "run"), Recipe.model_validate({"data": {"train": "boards"}})
    run.create()
    run.recipe.write_text(recipe.to_yaml())
    append_jsonl(run.metrics, ({"step": step} for step in range(1, recipe.train.save_steps + 1)))
    assert checkpoint_to_continue(run, recipe, "auto") is None  # cut inside its first save
    append_jsonl(run.metrics, [{"step": recipe.train.save_steps + 1}])
    with pytest.raises(RunDirError, match="recorded 51 steps but no longer contains a checkpoint"):
        checkpoint_to_continue(run, recipe, "auto")


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(arguments(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def stopped_at_4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    assert main(arguments(folder, "train.max_steps=4")) == 0
    return folder


@pytest.fixture
def half(stopped_at_4, tmp_path):
    """A copy of a run that was stopped at step 4, with the mirror that the recipe names."""
    shutil.copytree(stopped_at_4, tmp_path / "half")
    return tmp_path / "half"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": lambda path: path.unlink(),
    "bit-flipped": flip_a_bit,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "file"),
    [
        ("truncated", "optimizer.pt"),
        ("missing", "rng_state.pth"),
        ("bit-flipped", "adapter_model.safetensors"),
        ("truncated", "complete.json"),
    ],
)
def test_a_damaged_checkpoint_costs_its_steps_and_a_word(half, whole, damage, file, capsys):
    DAMAGES[damage](half / "run/checkpoints/checkpoint-4" / file)
    assert main(arguments(half)) == 0
    said = capsys.readouterr().out
    assert "checkpoint-4 is removed: " in said and f"{file}" in said.split("checkpoint-4 is removed: ")[1][:120]
    assert "checkpoint-2." in said and differences(half, whole) == []


@pytest.mark.slow
def test_an_earlier_checkpoint_by_name_runs_its_steps_again(half, whole, capsys):
    resumed = arguments(half)
    resumed[resumed.index("auto")] = str(half / "run/checkpoints/checkpoint-2")
    assert main(resumed) == 0
    assert "checkpoint-4 is removed: its steps are run again" in capsys.readouterr().out
    assert differences(half, whole) == []


@pytest.mark.slow
def test_a_finished_run_continued_again_stays_what_it_is(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "again")
    assert main(arguments(tmp_path / "again")) == 0
    assert differences(tmp_path / "again", whole) == []


@pytest.mark.slow
def test_another_recipe_is_refused_with_its_keys_and_nothing_is_touched(half, capsys):
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    assert main(arguments(half, "grpo.beta=0.5", "data.limit=15")) == 2
    error = capsys.readouterr().err
    assert "grpo.beta: 0.04 in the run, 0.5 now" in error and "data.limit: 16 in the run, 15 now" in error
    assert before == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_minutes_save_between_the_steps_of_save_steps(tmp_path):
    run = RunDir(tmp_path / "run")
    options = ["train.save_steps=100", "train.save_minutes=1e-9", "train.keep_checkpoints=9", "train.max_steps=3"]
    assert main(arguments(tmp_path, *options)) == 0
    assert [path.name for path in run.valid_checkpoints()] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert load_recipe(run.recipe).train.save_minutes == 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.matrix), signal.SIGINT])
def test_a_signal_stops_in_order_and_says_how_to_go_on(tmp_path, whole, number):
    """As a supervisor sees it: the shell's exit code of that signal, one line, a checkpoint."""
    process = Forked(["-m", "apo_lora", *arguments(tmp_path, "train.save_steps=6")])
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.send_signal(number)  # as a launcher passes it on
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + number and "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"Stopped by {number.name} after step ") and "continue with --resume auto" in last
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert [path.name for path in RunDir(tmp_path / "run").valid_checkpoints()] == [f"checkpoint-{steps[-1]}"]
    assert main(arguments(tmp_path)) == 0
    assert differences(tmp_path, whole) == []


@pytest.mark.slow
def test_a_run_is_not_continued_on_other_rows(half, capsys):
    inputs = half / "run" / "inputs.json"
    record = json.loads(inputs.read_text())
    record["sets"]["data.train"]["sha256"] = "of other rows"
    inputs.write_text(json.dumps(record))
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    assert main(arguments(half)) == 2
    assert "data.train: 16 rows until now, 16 now, with other contents" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_whose_reward_was_mended_says_so_and_goes_on(half, whole, capsys):
    inputs = half / "run" / "inputs.json"
    record = json.loads(inputs.read_text())
    (reward,) = record["rewards"]
    record["rewards"][reward] = "of other code"
    inputs.write_text(json.dumps(record))
    assert main(arguments(half)) == 0
    assert f"the code of {reward}. The run continues with it." in capsys.readouterr().out
    assert differences(half, whole) == []


@pytest.mark.slow
def test_a_run_that_another_process_holds_is_left_alone(half, whole, capsys):
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    with locked(half / "run"):
        assert main(arguments(half)) == 2
    assert "another process is writing to it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_renamed_run_continues_by_its_own_recipe(half, whole, capsys):
    (half / "run").rename(half / "renamed")
    command = arguments(half, f"output.mirror=[{half}/mirror]")
    words = [word for word in command if not word.startswith("output.dir=")]
    words[words.index("tiny_cpu")] = str(half / "renamed" / "recipe.yaml")
    assert main(words) == 0
    assert "Continuing from " in capsys.readouterr().out and not (half / "run").exists()
    (half / "renamed").rename(half / "run")
    assert differences(half, whole) == []
