"""Held-out items measured during training: what is kept, when it stops, and that training does not notice."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from apo_lora.commands.main import main
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.rollout.credit import Rollout, ScoredRollout
from apo_lora.rollout.record import CompletionsView
from apo_lora.run.adapter import find_adapter
from apo_lora.run.callbacks import Validation
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl, read_jsonl
from apo_lora.run.validation import measured, why_stopped
from tests.faults.tiny_runs import arguments

OPTIONS = ["data.eval_limit=4", "output.mirror=[]", "train.save_steps=1", "train.keep_checkpoints=9"]
MEASURED = ["train.eval_steps=2", "train.eval_items=3", "output.keep_best=true"]


def found(accuracy):
    return {"held_out_accuracy": accuracy, "held_out_accuracy_low": 0.0, "held_out_accuracy_high": 1.0}


@pytest.fixture
def play(tmp_path):
    """Plays a training whose measurements at steps 2, 4, ... are given; returns the steps kept and the last step."""

    def go(*accuracies, patience=None, keep_best=True):
        changes = ["train.eval_steps=2", f"train.patience={patience or 'null'}", f"output.keep_best={keep_best}"]
        run, kept, state = RunDir(tmp_path), [], SimpleNamespace(global_step=0)
        control = SimpleNamespace(should_training_stop=False, should_save=False)
        coming = iter(accuracies)
        recipe = load_recipe(find_recipe("tiny_cpu"), changes)
        callback = Validation(run, recipe, lambda step: found(next(coming)), lambda: kept.append(state.global_step))
        callback.on_train_begin(None, state, control)
        for state.global_step in range(1, 2 * len(accuracies) + 1):
            callback.on_step_end(None, state, control)
            assert ("held_out_accuracy" in callback.figures()) is (state.global_step % 2 == 0)
            append_jsonl(run.metrics, [{"step": state.global_step, **callback.figures()}])
            if control.should_training_stop:
                assert control.should_save
                break
        return kept, state.global_step

    return go


def test_the_best_so_far_is_kept_and_the_first_of_equals(play):
    assert play(0.2, 0.5, 0.5, 0.4, 0.6) == ([2, 4, 10], 10)


def test_nothing_is_kept_unasked(play):
    assert play(0.2, 0.5, keep_best=False) == ([], 4)


def test_it_stops_after_as_many_measurements_without_a_new_best(play, capsys):
    assert play(0.2, 0.5, 0.5, 0.4, 0.6, patience=2)[1] == 8
    assert "held-out accuracy was best at step 4, and train.patience is 2" in capsys.readouterr().out
    assert why_stopped({2: 0.5, 4: 0.4}, 1) and not why_stopped({2: 0.5, 4: 0.4}, 2)
    assert not why_stopped({}, 1) and not why_stopped({2: 0.5, 4: 0.4}, None)


def test_a_continued_run_knows_what_was_measured(play, tmp_path):
    append_jsonl(tmp_path / "metrics.jsonl", [{"step": 0, "held_out_accuracy": 0.9}, {"step": 1}])
    assert measured(RunDir(tmp_path)) == {0: 0.9}
    assert play(0.5, 0.95, patience=2) == ([4], 4)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_training_does_not_notice_and_a_resumed_run_measures_the_same(tmp_path, monkeypatch):
    plain, watched, disturbed = (tmp_path / name for name in ("plain", "watched", "disturbed"))
    for folder, changes in ((plain, []), (watched, MEASURED)):
        folder.mkdir()
        assert main(arguments(folder, *OPTIONS, *changes)) == 0
    assert same(weights(plain / "run" / "adapter"), weights(watched / "run" / "adapter"))
    disturbed.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("apo_lora.evaluation.held_out.HeldOut.validate", lambda self, step: found(torch.rand(1).item()))
        assert main(arguments(disturbed, *OPTIONS, *MEASURED)) == 0
    assert not same(weights(plain / "run" / "adapter"), weights(disturbed / "run" / "adapter"))
    run = RunDir(watched / "run")
    accuracies = measured(run)
    assert list(accuracies) == [2, 4, 6] and not measured(RunDir(plain / "run"))
    best = max(accuracies, key=accuracies.get)
    # A checkpoint is an adapter as well: the best one is that of its step, and not that of another.
    at = {step: weights(run.checkpoints / f"checkpoint-{step}") for step in (2, 4, 6)}
    assert same(weights(run.adapter_best), at[best]) and not same(at[2], at[6])
    assert find_adapter(run.adapter_best).recipe.train.eval_steps == 2
    rows, kept = list(read_jsonl(run.metrics)), weights(run.adapter_best)

    command = arguments(watched, *OPTIONS, *MEASURED)
    command[command.index("auto")] = str(run.checkpoints / "checkpoint-3")
    assert main(command) == 0
    for again, row in zip(read_jsonl(run.metrics), rows, strict=True):
        assert {n: v for n, v in again.items() if n.startswith("held_out")} == {
            n: v for n, v in row.items() if n.startswith("held_out")
        }
    assert same(weights(run.adapter_best), kept)


@pytest.mark.slow
def test_a_run_that_stopped_gaining_ends_well_and_is_not_trained_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("apo_lora.evaluation.held_out.HeldOut.validate", lambda self, step: found(1 / step))
    changes = [*OPTIONS, *MEASURED, "train.patience=1", "output.show_completions=3"]
    assert main(arguments(tmp_path, *changes)) == 0
    run = RunDir(tmp_path / "run")
    assert run.last_metrics()["step"] == 4 and "after" in json.loads(run.evaluation.read_text())
    said = capsys.readouterr()
    assert f"Best adapter {run.adapter_best} (step 2, held-out accuracy 0.500)" in said.out
    assert said.out.count("correct answer: ") == 2  # of steps 1 and 3
    assert main(arguments(tmp_path, *changes)) == 0
    assert run.last_metrics()["step"] == 4
    assert "Not trained on after step 4: held-out accuracy was best at step 2" in capsys.readouterr().out
    assert main(arguments(tmp_path, *changes, "train.patience=9")) == 0
    assert run.last_metrics()["step"] == 6


def test_completions_are_shown_in_one_line_each_without_what_a_terminal_obeys():
    texts = ["<think>\x1b[2Jwell\n</think><answer>3</answer>", "x" * 300 + "<answer>4</answer>"]
    credit = SimpleNamespace(advantages_NG=torch.tensor([[1.0, -1.0]]))
    rollout = SimpleNamespace(
        texts=texts, indices=[0, 0], rewards_BF=torch.tensor([[1.0, 0.5], [0.0, 0.5]]), lengths_B=torch.tensor([9, 301])
    )
    scored = SimpleNamespace(rollout=rollout, rewards_NG=torch.zeros(1, 2), credit=credit)
    assert set(vars(rollout)) <= set(Rollout.__dataclass_fields__)
    assert set(vars(scored)) <= set(ScoredRollout.__dataclass_fields__)
    example = SimpleNamespace(row=7, problem="How many?", gold="3")
    view = CompletionsView([example], ["accuracy", "format"], every=5, steps_per_rollout=1)
    title, gold, heading, first, second = view.lines(5, scored)
    assert (title, gold) == ("step 5, row 7: How many?", "correct answer: 3")
    assert heading.split() == ["accuracy", "format", "advantage", "tokens", "completion"]
    assert first.split() == ["1.00", "0.50", "+1.00", "9", "<think>", "[2Jwell", "</think><answer>3</answer>"]
    assert second.endswith("<answer>4</answer>") and " ... " in second and len(second) < 200
    assert all(line.isprintable() for line in (title, gold, heading, first, second))
