"""NaN and infinity at chosen steps of the real trainer: skipped, counted and shown; three in a row stop it."""

import math
from pathlib import Path

import pytest
import torch
from tiny_trainer import adapter, largest_difference, logged, recipe_of

from apo_lora.errors import TrainingStopped
from apo_lora.rewards.calls import CheckedRewards
from apo_lora.run.directory import RunDir

from .tiny_runs import arguments, steady_rows

SHORT = {"max_completion_length": 24}

pytestmark = pytest.mark.slow

NAN, INF = float("nan"), float("inf")


def weights_by_step(trainer):
    """The adapter before every optimizer step and at the end, filled while it trains."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        states: list = []

        def on_step_begin(self, *arguments, **options):
            self.states.append(adapter(trainer))

        def on_train_end(self, *arguments, **options):
            self.states.append(adapter(trainer))

    watch = Watch()
    watch.states = []
    trainer.add_callback(watch)
    return watch.states


def poison_logits(trainer, value, steps):
    """All logits, in sampling, scoring and training: scoring takes the head's weight, so what comes before it."""

    def spoil(module, arguments, output):
        return output * value if trainer.state.global_step + 1 in steps else output

    trainer.model.get_base_model().model.language_model.norm.register_forward_hook(spoil)


def poison_gradient(trainer, value, steps):
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * value if trainer.state.global_step + 1 in steps else gradient)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("poison", [poison_logits, poison_gradient])
def test_a_poisoned_step_is_skipped_counted_and_shown(make_trainer, poison, value, capsys):
    trainer = make_trainer(recipe_of(grpo=SHORT, train={"max_steps": 4, "save_steps": 4}))
    states = weights_by_step(trainer)
    poison(trainer, value, steps={2, 4})
    trainer.train()
    moved = [largest_difference(before, after) > 0 for before, after in zip(states, states[1:], strict=False)]
    assert moved == [True, False, True, False]
    assert [figures["skipped_nonfinite_steps"] for figures in logged(trainer)] == [0, 1, 1, 2]
    assert all(torch.isfinite(p).all() for p in states[-1].values())
    shown = [line for line in capsys.readouterr().out.splitlines() if "skipped:" in line]
    assert [line.split(":")[0].split() for line in shown] == [["step", "2", "skipped"], ["step", "4", "skipped"]]
    assert shown[0].endswith("1 so far") and shown[1].endswith("2 so far")


@pytest.mark.parametrize("poison", [poison_logits, poison_gradient])
def test_three_in_a_row_stop_with_the_last_good_adapter(make_trainer, poison):
    trainer = make_trainer(recipe_of(grpo=SHORT, train={"max_steps": 9, "save_steps": 9}))
    states = weights_by_step(trainer)
    poison(trainer, NAN, steps={2, 4, 5, 6})  # the one at step 2 alone does not count
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.nonfinite_guard.gave_up
    assert largest_difference(states[3], states[-1]) == 0 < largest_difference(states[2], states[3])
    assert isinstance(trainer.nonfinite_guard.stopped(6), TrainingStopped)
    (checkpoint,) = Path(trainer.args.output_dir).glob("checkpoint-*")
    from safetensors.torch import load_file

    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert saved and all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert all(torch.equal(saved[name.replace(".default", "")], tensor) for name, tensor in states[3].items())


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rewards_that_are_not_finite_are_zero_counted_and_shown(capsys):
    finite = CheckedRewards()

    def mine(completions):
        return [1.0, NAN, INF, -INF, None, 0.5]

    watched = finite.of(mine)
    six = [""] * 6
    assert watched(completions=six) == [1.0, 0.0, 0.0, 0.0, None, 0.5]
    watched(completions=six)
    assert finite.replaced == 6 and watched.__name__ == "mine"
    assert capsys.readouterr().out.count("warning: mine returned the reward nan") == 1


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_reward_that_is_not_finite_costs_no_step(make_trainer, value):
    """One completion of eight: it earns nothing, counted or not, where it would be all that its group is about."""

    def rewards_of(guard):
        trainer = make_trainer(recipe_of(grpo=SHORT, train={"max_steps": 1}))
        original = trainer.reward_funcs[0]

        def accuracy(completions, **columns):
            rewards = original(completions=completions, **columns)
            return [value, *rewards[1:]]

        trainer.reward_funcs[0] = guard.of(accuracy) if guard else accuracy
        before = adapter(trainer)
        trainer.train()
        return logged(trainer)[0], largest_difference(before, adapter(trainer))

    guard = CheckedRewards()
    figures, moved = rewards_of(guard)
    assert guard.replaced == 1 and moved > 0 and figures["skipped_nonfinite_steps"] == 0
    assert all(math.isfinite(value) for value in figures.values() if value is not None)
    unguarded, moved_unguarded = rewards_of(None)
    assert unguarded["reward"] == figures["reward"] and moved_unguarded == moved


def test_a_reward_file_that_gives_nan_is_counted_in_the_record(tmp_path, capsys):
    from apo_lora.commands.main import main

    (tmp_path / "mine.py").write_text(
        "def mine(completions, **columns):\n    return [float('nan'), None] + [0.5] * (len(completions) - 2)\n"
    )
    functions = f"rewards.functions=[accuracy,'{tmp_path}/mine.py:mine']"
    assert main(arguments(tmp_path, functions, "train.max_steps=2", "train.evaluate=false")) == 0
    assert [row["nonfinite_rewards"] for row in steady_rows(RunDir(tmp_path / "run").metrics)] == [1, 2]
    said = capsys.readouterr().out
    assert said.count("returned the reward nan") == 1 and "During training: 2 nonfinite rewards" in said


# --- float16 ---------------------------------------------------------------------------------------------------------


def with_scaler(trainer, scale):
    """torch's own GradScaler, on the CPU, where the trainer prepares the optimizer; float32 overflows at 2**128."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    create = trainer.create_optimizer

    def create_with_scaler(*arguments, **options):
        trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
        trainer.accelerator.state._mixed_precision = "fp16"
        return create(*arguments, **options)

    trainer.create_optimizer = create_with_scaler
    return scaler


def test_an_overflow_of_the_loss_scale_is_skipped_and_does_not_stop_the_run(make_trainer, capsys):
    trainer = make_trainer(recipe_of(grpo=SHORT, train={"max_steps": 8, "save_steps": 8, "max_nonfinite_steps": 2}))
    scaler = with_scaler(trainer, 2.0**127)
    states = weights_by_step(trainer)
    trainer.train()
    skipped = logged(trainer)[-1]["skipped_nonfinite_steps"]
    assert skipped >= 3 and trainer.state.global_step == 8 and not trainer.nonfinite_guard.gave_up
    assert scaler.get_scale() == 2.0 ** (127 - skipped)
    moved = [largest_difference(before, after) > 0 for before, after in zip(states, states[1:], strict=False)]
    assert moved == [False] * skipped + [True] * (8 - skipped)
    assert "overflow at loss scale" in capsys.readouterr().out
    assert (Path(trainer.args.output_dir) / "checkpoint-8" / "scaler.pt").is_file()


def test_a_nan_under_a_loss_scale_stops_the_run_all_the_same(make_trainer):
    trainer = make_trainer(recipe_of(grpo=SHORT, train={"max_steps": 9, "save_steps": 9, "max_nonfinite_steps": 3}))
    with_scaler(trainer, 1024.0)
    before = adapter(trainer)
    poison_logits(trainer, NAN, steps=range(10))
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.nonfinite_guard.gave_up
    assert largest_difference(before, adapter(trainer)) == 0


# --- ratios and empty batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_ratio_beyond_all_bounds_is_clamped(make_trainer, shift):
    """The old policy's and the reference's log-probs are off by 10,000 nats: exp of that is infinite."""
    trainer = make_trainer(recipe_of(grpo={"prompts_per_rollout": 4}, train={"max_steps": 2, "save_steps": 2}))
    score = trainer._score_frozen_policies

    def shifted(batch):
        score(batch)
        batch["ref_logps"] += shift
        batch["old_per_token_logps"] += shift

    trainer._score_frozen_policies = shifted
    trainer.train()
    assert torch.tensor(abs(shift)).exp().isinf()
    for figures in logged(trainer):
        assert figures["skipped_nonfinite_steps"] == 0
        assert all(math.isfinite(figures[name]) for name in ("loss", "kl", "grad_norm", "policy_loss"))


@pytest.mark.parametrize(
    "grpo",
    [
        {"max_completion_length": 2},  # every completion truncated
        {"max_completion_length": 2, "mask_truncated_completions": True},  # and none in the loss
        {"max_completion_length": 1, "zero_variance_groups": "skip"},
    ],
)
def test_batches_with_nothing_in_them_are_finite(make_trainer, grpo):
    trainer = make_trainer(recipe_of(grpo=grpo, train={"max_steps": 2, "save_steps": 2}))
    trainer.train()
    for figures in logged(trainer):
        assert figures["truncated"] == 1 and figures["skipped_nonfinite_steps"] == 0
        assert all(math.isfinite(value) for value in figures.values() if value is not None)
    assert all(torch.isfinite(p).all() for p in adapter(trainer).values())
