"""Run directories: nothing overwritten, checkpoints whole or recognised, every step recorded once."""

import json

import pytest
from checkpoints import checkpoint

from apo_lora.errors import RunDirError
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.checkpoints import seal_checkpoint, why_not_whole
from apo_lora.run.directory import RunDir, RunLock
from apo_lora.run.files import append_jsonl, read_jsonl
from apo_lora.run.resume import checkpoint_to_continue, find_checkpoint, of_its_run, rewind_record


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_an_existing_run_is_refused_with_both_remedies(run):
    with pytest.raises(RunDirError) as error:
        RunDir(run.path).create()
    (problem,) = error.value.problems
    assert "--resume auto" in problem and "output.dir=DIR" in problem


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirError, match="is a file"):
        RunDir(tmp_path / "run").create()


def test_the_last_whole_checkpoint_is_resumed(run):
    checkpoint(run, 9)
    checkpoint(run, 10)  # as text, 10 sorts before 9
    checkpoint(run, 11, sealed=False)
    assert find_checkpoint(run, "auto").name == "checkpoint-10"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "complete.json").unlink(), "has no complete.json"),
        (lambda path: (path / "complete.json").write_text('{"adapter'), "cannot be read"),
        (lambda path: (path / "complete.json").write_text("[]"), "cannot be read"),
        (lambda path: (path / "complete.json").write_bytes(b"\xff{}"), "cannot be read"),
        (lambda path: (path / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(bytes(range(99))), "changed or truncated"),
        (
            lambda path: (path / "adapter_model.safetensors").write_bytes(bytes(range(99)) + b"x"),
            "changed or truncated",
        ),
    ],
)
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_taken(run, damage, words):
    before, damaged = checkpoint(run, 5), checkpoint(run, 10)
    assert find_checkpoint(run, "auto") == damaged
    damage(damaged)
    assert words in why_not_whole(damaged)
    assert find_checkpoint(run, "auto") == before
    with pytest.raises(RunDirError, match="not a complete checkpoint"):
        find_checkpoint(run, str(damaged))


def test_before_the_first_checkpoint_there_is_none_to_resume(tmp_path, run):
    assert find_checkpoint(run, "auto") is None
    checkpoint(run, 1, sealed=False)  # killed inside the first save
    assert find_checkpoint(run, "auto") is None
    assert find_checkpoint(RunDir(tmp_path / "nowhere"), "auto") is None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(run):
    (checkpoint(run, 5) / "trainer_state.json").unlink()
    with pytest.raises(RunDirError) as error:
        find_checkpoint(run, "auto")
    assert "no longer contains a complete checkpoint" in str(error.value) and "trainer_state.json is missing" in str(
        error.value
    )


def test_a_folder_of_other_files_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunDirError, match="contains other files but no run"):
        find_checkpoint(RunDir(tmp_path), "auto")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="is a file"):
        find_checkpoint(RunDir(tmp_path / "file"), "auto")


def test_starting_again_drops_the_record(run):
    append_jsonl(run.metrics, [{"step": 1}])
    run.evaluation.write_text("{}")
    run.start_again()
    assert list(read_jsonl(run.metrics)) == [] and not run.evaluation.exists()


def test_going_back_leaves_whole_checkpoints_up_to_there_and_says_what_went(run):
    for step in (2, 4, 6):
        checkpoint(run, step)
    checkpoint(run, 7, sealed=False)
    said = list(rewind_record(run, run.checkpoints / "checkpoint-2"))
    assert said == [
        "checkpoint-7 is removed: it has no complete.json, so it was not completely written.",
        "checkpoint-4 is removed: its steps are run again.",
        "checkpoint-6 is removed: its steps are run again.",
        f"Continuing from {run.checkpoints / 'checkpoint-2'}.",
    ]
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]


def test_temporaries_of_a_kill_go_and_files_stay(run):
    run.images.mkdir()
    (run.path / ".adapter.tmp").mkdir()
    litter = [run.path / ".recipe.tmp.yaml", run.images / ".boards-1.tmp.png", run.path / ".adapter.tmp/weights"]
    for path in litter:
        path.write_text("")
    append_jsonl(run.metrics, [{"step": 1}])
    run.remove_temporaries()
    assert not [path for path in litter if path.exists()]
    assert {path.name for path in run.path.iterdir()} == {"checkpoints", "images", "metrics.jsonl"}


def test_old_checkpoints_go_and_whole_ones_stay(run):
    for step in (1, 2, 3, 4):
        checkpoint(run, step)
    run.remove_old_checkpoints(keep=2)
    assert [path.name for path in run.valid_checkpoints()] == ["checkpoint-3", "checkpoint-4"]


def test_rewind_leaves_every_step_once(run):
    append_jsonl(run.metrics, ({"step": step, "kl": 0.1} for step in range(1, 8)))
    append_jsonl(run.completions, ({"step": step} for step in (1, 1, 2, 2, 3, 3)))
    run.rewind(2)
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2]
    assert [row["step"] for row in read_jsonl(run.completions)] == [1, 1, 2, 2]


# --- other runs, other places ----------------------------------------------------------------------------------------


@pytest.fixture
def begun(run):
    """A run that has a recipe and a whole checkpoint."""
    run.recipe.write_text(load_recipe(find_recipe("tiny_cpu")).to_yaml())
    append_jsonl(run.metrics, [{"step": step, "reward": step / 10, "kl": 0.5} for step in (1, 2, 3)])
    with_history(run, 2, [{"step": step, "reward": step / 10, "kl": 0.5} for step in (1, 2)])
    return run


def with_history(run, step, rows):
    folder = checkpoint(run, step, sealed=False)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    seal_checkpoint(folder)
    return folder


def recipe_in(run):
    return load_recipe(run.recipe, [f"output.dir={run.path}"])


def test_a_checkpoint_belongs_to_the_run_whose_record_is_cut_to_it(begun, tmp_path):
    own = begun.checkpoints / "checkpoint-2"
    assert checkpoint_to_continue(begun, recipe_in(begun), str(own)) == own
    other = RunDir(tmp_path / "other")
    other.create()
    foreign = checkpoint(other, 2)
    with pytest.raises(RunDirError, match="not a checkpoint of .*run, whose record would be cut"):
        checkpoint_to_continue(begun, recipe_in(begun), str(foreign))
    linked = tmp_path / "link"
    linked.symlink_to(own)
    assert checkpoint_to_continue(begun, recipe_in(begun), str(linked)) == linked


def test_a_checkpoint_that_was_copied_from_another_run_is_told_by_its_steps(begun):
    with_history(begun, 3, [{"step": step, "reward": step / 10, "kl": 0.5} for step in (2, 3)])
    assert checkpoint_to_continue(begun, recipe_in(begun), "auto").name == "checkpoint-3"
    with_history(begun, 4, [{"step": 2, "reward": 0.2, "kl": 0.5}, {"step": 3, "reward": 0.9, "kl": 0.5}])
    with pytest.raises(RunDirError, match="checkpoint-4 was saved by another run: its step 3"):
        checkpoint_to_continue(begun, recipe_in(begun), "auto")


def test_a_run_that_was_renamed_goes_on_where_it_is(begun, tmp_path):
    recipe = load_recipe(begun.recipe, ["output.dir=somewhere/before"])
    begun.path.rename(tmp_path / "renamed")
    file = tmp_path / "renamed" / "recipe.yaml"
    assert of_its_run(recipe, file, []).output.dir == str(tmp_path / "renamed")
    assert of_its_run(recipe, file, ["output.dir=elsewhere"]) is recipe
    assert of_its_run(recipe, find_recipe("tiny_cpu"), []) is recipe


def test_a_run_is_locked_from_its_start_or_its_making(tmp_path):
    run = RunDir(tmp_path / "run")
    with RunLock(run) as first, RunLock(run) as second:
        first.take()  # nothing is there to lock
        assert not run.path.exists()
        first.make_and_take()
        first.take()
        with pytest.raises(RunDirError, match="another process"):
            second.take()
    with RunLock(run) as later:
        later.take()
