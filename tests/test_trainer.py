"""APOTrainer on the tiny model: the same gradient for any split, the right reference, skipped NaN steps."""

import itertools

import pytest
import torch
from tiny_trainer import (
    LOSSES,
    KeepGradients,
    adapter,
    from_an_older_policy,
    largest_difference,
    logged,
    recipe_of,
)
from torch.utils._python_dispatch import TorchDispatchMode
from trl import GRPOTrainer

from apo_lora.apo import apo_loss
from apo_lora.errors import RewardError
from apo_lora.trainer import APOTrainer


def test_any_micro_batch_split_gives_the_same_adapter(make_trainer):
    """The same rollouts in passes of 16, 1 and 4, with DADS weights and STCR factors away from 1."""
    results = []
    for completions_per_pass in (16, 1, 4):
        grpo = {"num_generations": 8, "completions_per_pass": completions_per_pass}
        trainer = make_trainer(recipe_of(grpo=grpo))
        fresh = adapter(trainer)
        trainer.train()
        results.append((adapter(trainer), logged(trainer)))
    trained, (first, _) = results[0]
    assert largest_difference(fresh, trained) > 1e-3
    assert first["dads_weight_positives"] < 0.99 and first["stcr_multiplier"] > 1.01
    for other, figures in results[1:]:
        assert figures[0]["reward"] == first["reward"] and figures[0]["length"] == first["length"]  # the same rollout
        for name in ("policy_loss", "kl", "grad_norm", "entropy"):
            assert figures[0][name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
        # Adam divides by the size of the gradient: where that is rounding noise, so is the first step.
        assert sum((other[n] - trained[n]).norm() for n in trained) < 1e-2 * sum(
            (fresh[n] - trained[n]).norm() for n in trained
        )


def test_step_gradient_is_the_sum_over_micro_batches(make_trainer):
    """Under every loss, and each has a gradient of its own."""
    gradients = {}
    for name, options in LOSSES.items():
        for completions_per_pass in (8, 1, 4) if name == "released" else (8, 2):
            grpo = {"completions_per_pass": completions_per_pass, "num_iterations": 2, **options}
            trainer = from_an_older_policy(make_trainer(recipe_of(grpo=grpo, train={"max_steps": 1})))
            gradient = step_gradient(trainer)
            whole = gradients.setdefault(name, gradient)
            assert (gradient - whole).norm() < 1e-5 * whole.norm(), (name, completions_per_pass)
            assert logged(trainer)[0]["clip_fraction"] > 0.05
    for one, other in itertools.combinations(gradients, 2):
        assert (gradients[one] - gradients[other]).norm() > 1e-2 * gradients[one].norm(), (one, other)


def test_without_dads_every_loss_is_trls(make_trainer):
    """TRL's own function on the same rollout and log-probs. Only with "grpo" is its KL a mean over sequences."""
    grpo = {"num_iterations": 2, "temperature": 1.5}
    trainer = from_an_older_policy(make_trainer(recipe_of(grpo=grpo, apo={"dads": None}, train={"max_steps": 1})))
    trainer.train()  # a fresh adapter has no KL
    trainer._step = 0
    (batch,) = trainer._buffered_inputs
    assert len(set(batch["completion_mask"].sum(1).tolist())) > 1  # or the normalisations are all alike
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (*trainer._score(batch), None)
    trainer.aux_loss_enabled = False

    def gradient():
        found = torch.cat([p.grad.flatten() for p in trainer.trained_parameters])
        trainer.model.zero_grad()
        return found

    trainer.model.zero_grad()
    found = []
    for loss_type, level, epsilon_high, beta in (
        ("dapo", "token", None, 0.0),
        ("grpo", "token", 0.4, 0.1),
        ("grpo", "sequence", 0.05, 0.1),
        ("dr_grpo", "token", 0.4, 0.0),
        ("dr_grpo", "sequence", None, 0.0),
    ):
        chosen = {"loss_type": loss_type, "importance_sampling_level": level, "epsilon_high": epsilon_high}
        for name, value in {**chosen, "beta": beta}.items():
            setattr(trainer.args, name, value)
            setattr(trainer, name, value)
        trainer.epsilon_high = epsilon_high or trainer.args.epsilon
        ours = trainer.compute_loss(trainer.model, batch).item()
        our_gradient = gradient()
        theirs = GRPOTrainer._compute_loss(trainer, trainer.model, {**batch, "ref_per_token_logps": batch["ref_logps"]})
        theirs.backward()
        their_gradient = gradient()
        assert ours == pytest.approx(theirs.item(), rel=1e-5, abs=1e-7), chosen
        assert (our_gradient - their_gradient).norm() < 1e-5 * their_gradient.norm(), chosen
        found.append(our_gradient)
    for one, other in itertools.combinations(found, 2):
        assert (one - other).norm() > 1e-2 * one.norm()


def test_plain_grpo_differs_from_apo(make_trainer):
    apo = make_trainer(recipe_of())
    apo.train()
    grpo = make_trainer(recipe_of(apo={"dads": None, "stcr": None}))
    grpo.train()
    assert logged(grpo)[0]["length"] == logged(apo)[0]["length"]  # the same first rollout
    assert largest_difference(adapter(apo), adapter(grpo)) > 1e-5
    assert logged(grpo)[0]["dads_weight_positives"] in (1.0, None)
    assert logged(grpo)[0]["stcr_amplified"] == 0


def test_the_first_step_has_no_kl_and_later_ones_have(make_trainer):
    trainer = make_trainer(recipe_of(train={"max_steps": 3}))
    trainer.train()
    first, *_, last = logged(trainer)
    assert first["kl"] == 0 and last["kl"] > 1e-4


def test_every_figure_of_a_step_is_there(make_trainer):
    trainer = make_trainer(recipe_of())
    trainer.train()
    expected = {
        "reward", "accuracy", "reward_accuracy", "advantage_std", "zero_variance_groups", "all_right_groups",
        "all_wrong_groups", "length_correct", "length_wrong", "truncated", "kl", "kl_positives", "kl_negatives",
        "dads_weight_positives", "stcr_amplified", "stcr_multiplier", "entropy", "entropy_correct", "entropy_wrong",
        "clip_fraction", "grad_norm", "seconds_generate", "seconds_reward", "seconds_score", "seconds_train",
        "tokens_per_second", "peak_memory_bytes", "skipped_nonfinite_steps", "learning_rate", "loss",
    }  # fmt: skip
    for figures in logged(trainer):
        assert expected <= figures.keys()
        assert figures["seconds"] == pytest.approx(sum(v for k, v in figures.items() if k.startswith("seconds_")), 1e-6)


def test_gradient_checkpointing_changes_nothing_and_is_off_while_sampling(make_trainer):
    gradients = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            recipe_of(model={"gradient_checkpointing": checkpointing}, train={"max_steps": 1}),
            gradient_checkpointing=checkpointing,
        )
        keep = KeepGradients()
        trainer.add_callback(keep)
        trainer.train()  # asserts that the cache is on and checkpointing off while sampling
        gradients.append(keep.gradient)
        assert trainer.model.is_gradient_checkpointing is checkpointing
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_dropout_is_for_the_gradient_alone(make_trainer):
    """Sampling and the reference are without it: the same rollout as with none, and other gradients."""
    figures = []
    for dropout in (0.0, 0.3):
        trainer = make_trainer(recipe_of(train={"max_steps": 1}), lora={"dropout": dropout})
        trainer.train()
        figures.append(logged(trainer))
    without, with_dropout = figures
    assert with_dropout[0]["reward"] == without[0]["reward"] and with_dropout[0]["length"] == without[0]["length"]
    assert with_dropout[0]["grad_norm"] != without[0]["grad_norm"]


def test_a_rollout_may_feed_several_steps(make_trainer):
    """Off-policy steps use the old policy's log-probs: the second step's ratio is no longer 1."""
    trainer = make_trainer(recipe_of(grpo={"prompts_per_rollout": 4}, train={"max_steps": 2, "save_steps": 2}))
    seen = []
    original = trainer.compute_loss

    def watch(model, inputs, **options):
        with torch.no_grad():
            logps, _ = trainer._score(inputs)
        seen.append((logps - inputs["old_per_token_logps"]).abs().max().item())
        return original(model, inputs, **options)

    trainer.compute_loss = watch
    trainer.train()
    assert len(seen) == 2 and seen[0] < 1e-5 < 1e-3 < seen[1]
    assert logged(trainer)[1]["reward"] == logged(trainer)[0]["reward"]  # one rollout, two steps


def test_a_nonfinite_step_is_skipped_and_counted(make_trainer):
    trainer = make_trainer(recipe_of(train={"max_steps": 3}))
    original, states = trainer.compute_loss, []

    def poison(model, inputs, **options):
        states.append(adapter(trainer))
        loss = original(model, inputs, **options)
        return loss * float("nan") if len(states) == 2 else loss

    trainer.compute_loss = poison
    trainer.train()
    states.append(adapter(trainer))
    assert largest_difference(states[0], states[1]) > 0  # step 1 moved
    assert largest_difference(states[1], states[2]) == 0  # step 2 was NaN
    assert largest_difference(states[2], states[3]) > 0  # step 3 went on
    assert all(torch.isfinite(p).all() for p in states[3].values())
    assert [figures["skipped_nonfinite_steps"] for figures in logged(trainer)] == [0, 1, 1]


def test_a_nonfinite_gradient_of_a_finite_loss_is_skipped_too(make_trainer):
    trainer = make_trainer(recipe_of(train={"max_steps": 1}))
    before = adapter(trainer)
    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient / 0.0)
    trainer.train()
    assert logged(trainer)[0]["skipped_nonfinite_steps"] == 1
    assert largest_difference(before, adapter(trainer)) == 0


def test_nonfinite_steps_in_a_row_stop_the_run(make_trainer, monkeypatch):
    from apo_lora import trainer as module

    def infinite_loss(*arguments, **options):
        loss, figures = apo_loss(*arguments, **options)
        return loss * float("inf"), figures

    monkeypatch.setattr(module, "apo_loss", infinite_loss)
    trainer = make_trainer(recipe_of(train={"max_steps": 9, "max_nonfinite_steps": 2}))
    before = adapter(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.nonfinite_guard.gave_up
    assert largest_difference(before, adapter(trainer)) == 0
    assert "2 steps in a row" in str(trainer.nonfinite_guard.stopped(2))


def test_vision_tokens_are_never_sampled(make_trainer, monkeypatch):
    from apo_lora.family.qwen2_5_vl import QWEN2_5_VL

    trainer = make_trainer(recipe_of(grpo={"temperature": 50.0, "max_completion_length": 64}))  # nearly uniform
    forbidden = set(QWEN2_5_VL.vision_token_ids(trainer.processing_class))
    sampled = set()
    original = trainer._calculate_rewards

    def watch(inputs, prompts, completions, completion_ids_list):
        sampled.update(*completion_ids_list)
        return original(inputs, prompts, completions, completion_ids_list)

    monkeypatch.setattr(trainer, "_calculate_rewards", watch)
    trainer.train()
    assert len(sampled) > 200 and not sampled & forbidden


def test_all_truncated_and_masked_gives_finite_figures(make_trainer):
    trainer = make_trainer(
        recipe_of(grpo={"max_completion_length": 2, "mask_truncated_completions": True}, train={"max_steps": 1})
    )
    before = adapter(trainer)
    trainer.train()
    (figures,) = logged(trainer)
    assert figures["truncated"] == 1 and figures["loss"] == 0 and figures["kl"] is None
    assert largest_difference(before, adapter(trainer)) == 0


def test_4bit_trains_on_the_cpu(make_trainer):
    trainer = make_trainer(recipe_of(), load_in_4bit=True)
    before = adapter(trainer)
    trainer.train()
    assert logged(trainer)[0]["kl"] == 0
    assert largest_difference(before, adapter(trainer)) > 1e-3


def test_config_values_survive_construction(load_tiny, tmp_path):
    from apo_lora.rollout.training_arguments import config_values, training_arguments

    policy, recipe = load_tiny(), recipe_of()
    config = training_arguments(recipe, policy, tmp_path, 2)
    for key, value in config_values(recipe, policy, tmp_path, 2).items():
        if key not in ("report_to", "optim", "lr_scheduler_type", "save_strategy"):
            assert getattr(config, key) == value, key


def test_out_of_memory_halves_the_pass_and_changes_nothing(make_trainer):
    """A pretended card that holds 2 completions at a time, and runs out in the middle of backward as well."""
    roomy = make_trainer(recipe_of())
    roomy.train()

    tight = make_trainer(recipe_of())
    original, backward, failures = tight._forward, tight.accelerator.backward, []

    def forward(inputs, *totals):
        if len(inputs["prompt_ids"]) > 4:
            failures.append("forward")
            raise torch.OutOfMemoryError("pretended")
        return original(inputs, *totals)

    def backward_runs_out_once(loss, **options):
        backward(loss, **options)  # the gradients of this pass are there already
        if "backward" not in failures:
            failures.append("backward")
            raise torch.OutOfMemoryError("pretended")

    tight._forward, tight.accelerator.backward = forward, backward_runs_out_once
    tight.train()
    assert failures == ["forward", "backward"] and tight.pass_size.rows == 2
    for one, other in zip(logged(roomy), logged(tight), strict=True):
        for name in ("loss", "policy_loss", "grad_norm", "entropy"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
    moved = sum((adapter(roomy)[n] - adapter(tight)[n]).norm() for n in adapter(roomy))
    assert moved < 1e-2 * sum(p.norm() for p in adapter(roomy).values())


def test_out_of_memory_keeps_the_gradients_of_earlier_micro_batches(make_trainer):
    """It strikes at the end of the second micro-batch's backward, when its gradients are there already."""
    one_step = recipe_of(grpo={"completions_per_pass": 4}, train={"max_steps": 1})
    expected = step_gradient(make_trainer(one_step))
    tight = make_trainer(one_step)
    backward, calls = tight.accelerator.backward, []

    def second_runs_out(loss, **options):
        backward(loss, **options)
        calls.extend([loss] if loss.grad_fn else [])  # the Trainer's own backward gets a leaf
        if loss.grad_fn and len(calls) == 2:
            raise torch.OutOfMemoryError("pretended")

    tight.accelerator.backward = second_runs_out
    gradient = step_gradient(tight)
    assert len(calls) == 4 and tight.pass_size.rows == 2  # 4 completions; 4 in vain; twice 2
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_gradients_stay_on_the_device_between_micro_batches(make_trainer):
    """They would go to the CPU and back in every one: thousands of small copies a step for the 3B."""
    trainer = make_trainer(recipe_of(grpo={"completions_per_pass": 2}, train={"max_steps": 1}))
    copied, accumulated, compute_loss = [], [], trainer.compute_loss

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
                copied.append(arguments[0].data_ptr())
            return function(*arguments, **(options or {}))

    def watch(model, inputs, **options):
        with Copies():
            loss = compute_loss(model, inputs, **options)
        accumulated.append([p.grad.data_ptr() for p in trainer.trained_parameters])
        return loss

    trainer.compute_loss = watch
    trainer.train()
    assert len(accumulated) == 4 and all(pointers == accumulated[0] for pointers in accumulated)
    assert copied and not set(copied) & set(accumulated[0])


def test_out_of_memory_with_one_completion_names_what_helps(make_trainer):
    from apo_lora.errors import TrainingStopped

    trainer = make_trainer(recipe_of(grpo={"completions_per_pass": 1}))

    def forward(inputs, *totals):
        raise torch.OutOfMemoryError("pretended")

    trainer._forward = forward
    with pytest.raises(TrainingStopped, match="data.max_pixels"):
        trainer.train()


# --- shared prompts --------------------------------------------------------------------------------------------------


def step_gradient(trainer):
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    return keep.gradient


def watch_passes(trainer):
    """The micro-batches, as compute_loss gets them."""
    seen, original = [], trainer.compute_loss

    def watch(model, inputs, **options):
        seen.append(inputs)
        return original(model, inputs, **options)

    trainer.compute_loss = watch
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prompts_give_the_same_step(make_trainer, checkpointing):
    """For any split: whole groups, parts of one, one and a half."""
    one_step = {"train": {"max_steps": 1}, "model": {"gradient_checkpointing": checkpointing}}

    def gradient(**grpo):
        return step_gradient(make_trainer(recipe_of(grpo=grpo, **one_step), gradient_checkpointing=checkpointing))

    alone = gradient(shared_prompt=False)
    for completions_per_pass in (8, 2) if checkpointing else (8, 4, 2, 1):
        assert (gradient(completions_per_pass=completions_per_pass) - alone).norm() < 1e-5 * alone.norm()
    if checkpointing:
        return
    other = gradient(num_generations=6, completions_per_pass=12, shared_prompt=False)
    assert (other - alone).norm() > 1e-2 * alone.norm()
    for completions_per_pass in (12, 4):
        shared = gradient(num_generations=6, completions_per_pass=completions_per_pass)
        assert (shared - other).norm() < 1e-5 * other.norm()


def test_groups_stay_together(make_trainer):
    """Also where a rollout feeds several steps, and in every iteration over it."""
    grpo = {"prompts_per_rollout": 4, "num_iterations": 2, "completions_per_pass": 4}
    trainer = make_trainer(recipe_of(grpo=grpo, train={"max_steps": 4, "save_steps": 4}))
    passes = watch_passes(trainer)
    trainer.train()
    assert [rows["group"].tolist() for rows in passes] == 2 * [[group] * 4 for group in range(4)]
    for rows in passes:
        assert (rows["prompt_ids"] == rows["prompt_ids"][0]).all()


def test_the_tower_runs_once_per_prompt_and_rollout(make_trainer):
    """For sampling, the reference, the old policy and two steps over two iterations."""
    grpo = {"prompts_per_rollout": 4, "num_iterations": 2, "completions_per_pass": 2}
    trainer = make_trainer(recipe_of(grpo=grpo, train={"max_steps": 8, "save_steps": 4}))
    images = []
    trainer.model.get_base_model().model.visual.register_forward_hook(
        lambda module, arguments, options, output: images.append(len(options["grid_thw"])), with_kwargs=True
    )
    trainer.train()
    assert images == [4, 4]  # two rollouts of 4 prompts with 4 completions


def test_a_tower_that_trains_is_not_computed_once(make_trainer):
    trainer = make_trainer(recipe_of(train={"max_steps": 1}), lora={"vision": True})
    passes = watch_passes(trainer)
    shared = step_gradient(trainer)
    assert all("group" in rows and "image_features" not in rows for rows in passes)
    alone = step_gradient(
        make_trainer(recipe_of(grpo={"shared_prompt": False}, train={"max_steps": 1}), lora={"vision": True})
    )
    assert (shared - alone).norm() < 1e-5 * alone.norm()


def test_a_model_that_cannot_share_prompts_trains_all_the_same(make_trainer, monkeypatch, capsys):
    from apo_lora import trainer as module

    expected = step_gradient(make_trainer(recipe_of(train={"max_steps": 1})))
    monkeypatch.setattr(module, "obstacle", lambda model: "not today")
    trainer = make_trainer(recipe_of(train={"max_steps": 1}))
    assert capsys.readouterr().out.count("shared_prompt: not used, not today") == 1
    passes = watch_passes(trainer)
    gradient = step_gradient(trainer)
    assert all("group" not in rows for rows in passes)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


# --- the rewards of a script -----------------------------------------------------------------------------------------


def with_rewards(trainer, *functions):
    return APOTrainer(
        trainer.model, list(functions), trainer.args,
        processing_class=trainer.processing_class, train_dataset=trainer.train_dataset,
    )  # fmt: skip


def test_a_scripts_reward_functions_are_checked(make_trainer):
    def words(completions, **columns):
        return {"overall": [1.0] * len(completions)}

    async def late(completions, **columns):
        return [float(place % 2) for place in range(len(completions))]

    trainer = make_trainer(recipe_of(train={"max_steps": 1}))
    trainer.args.correct_by = None  # the first
    with pytest.raises(RewardError, match="reward 'words' returned a mapping"):
        with_rewards(trainer, words).train()
    awaited = with_rewards(trainer, late)
    assert awaited.reward_func_names == ["late"]
    awaited.train()
    assert logged(awaited)[0]["reward_late"] == 0.5
