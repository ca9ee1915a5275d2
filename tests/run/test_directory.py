"""Run directories: nothing overwritten, checkpoints whole or recognised, every step recorded once."""

import json

import pytest
from checkpoints import checkpoint

from apo_lora.errors import RunDirError
from apo_lora.run.directory import (
    RunDir,
    append_jsonl,
    is_whole,
    read_jsonl,
    why_not_whole,
    write_atomically,
)


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
    assert run.checkpoint_to_resume("auto").name == "checkpoint-10"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "complete.json").unlink(), "has no complete.json"),
        (lambda path: (path / "complete.json").write_text('{"adapter'), "cannot be read"),
        (lambda path: (path / "complete.json").write_text("[]"), "cannot be read"),
        (lambda path: (path / "complete.json").write_bytes(b"\xff{}"), "cannot be read"),
        (lambda path: (path / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(bytes(range(99))), "changed or cut short"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(bytes(range(99)) + b"x"), "changed or cut"),
    ],
)
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_taken(run, damage, words):
    before, damaged = checkpoint(run, 5), checkpoint(run, 10)
    assert run.checkpoint_to_resume("auto") == damaged
    damage(damaged)
    assert words in why_not_whole(damaged)
    assert run.checkpoint_to_resume("auto") == before
    with pytest.raises(RunDirError, match="not a whole checkpoint"):
        run.checkpoint_to_resume(str(damaged))


def test_before_the_first_checkpoint_there_is_none_to_resume(tmp_path, run):
    assert run.checkpoint_to_resume("auto") is None
    checkpoint(run, 1, sealed=False)  # killed inside the first save
    assert run.checkpoint_to_resume("auto") is None
    assert RunDir(tmp_path / "nowhere").checkpoint_to_resume("auto") is None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(run):
    (checkpoint(run, 5) / "trainer_state.json").unlink()
    with pytest.raises(RunDirError) as error:
        run.checkpoint_to_resume("auto")
    assert "holds no whole checkpoint any more" in str(error.value) and "trainer_state.json is missing" in str(
        error.value
    )


def test_a_folder_of_other_files_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunDirError, match="holds other files and no run"):
        RunDir(tmp_path).checkpoint_to_resume("auto")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="is a file"):
        RunDir(tmp_path / "file").checkpoint_to_resume("auto")


def test_starting_again_drops_the_record(run):
    append_jsonl(run.metrics, [{"step": 1}])
    run.evaluation.write_text("{}")
    run.start_again()
    assert list(read_jsonl(run.metrics)) == [] and not run.evaluation.exists()


def test_going_back_removes_what_comes_later(run):
    for step in (2, 4, 6):
        checkpoint(run, step)
    assert [path.name for path in run.remove_later_checkpoints(2)] == ["checkpoint-4", "checkpoint-6"]
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
    unfinished = checkpoint(run, 5, sealed=False)
    run.remove_old_checkpoints(keep=2)
    assert [path.name for path in run.valid_checkpoints()] == ["checkpoint-3", "checkpoint-4"]
    assert run.remove_all_but_whole_checkpoints() == {unfinished.name: "it has no complete.json: its writing was cut"}
    assert all(is_whole(path) for path in run.checkpoints.iterdir())


def test_rewind_leaves_every_step_once(run):
    append_jsonl(run.metrics, ({"step": step, "kl": 0.1} for step in range(1, 8)))
    append_jsonl(run.completions, ({"step": step} for step in (1, 1, 2, 2, 3, 3)))
    run.rewind(2)
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2]
    assert [row["step"] for row in read_jsonl(run.completions)] == [1, 1, 2, 2]


def test_a_line_cut_by_a_kill_is_left_out(run):
    append_jsonl(run.metrics, [{"step": 1}, {"step": 2}])
    text = run.metrics.read_text()
    run.metrics.write_text(text[:-5])
    assert list(read_jsonl(run.metrics)) == [{"step": 1}]


def test_any_text_can_be_recorded(run):
    append_jsonl(run.completions, [{"step": 1, "completion": "half a character \ud800, null \0, right-to-left \u202e"}])
    (row,) = read_jsonl(run.completions)
    assert row["completion"].startswith("half a character") and "\u202e" in row["completion"]


def test_atomic_writes_leave_no_litter(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_atomically(path, "1")
    write_atomically(path, "2")
    assert json.loads(path.read_text()) == 2
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]
