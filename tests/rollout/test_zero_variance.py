"""Groups that teach nothing: kept as they are, computed by nobody, or replaced."""

import pytest
import torch
from tiny_trainer import KeepGradients, logged, recipe_of

from apo_lora import APOCallback
from apo_lora.policy.batches import row_slices, with_rows_replaced
from apo_lora.policy.loading import reference_mode
from apo_lora.policy.scoring import token_logps
from apo_lora.recipe.combinations import combination_problems


def spoiled(trainer, prompts):
    """Only completions to these prompts (by index) differ in their reward; the others all earn nothing."""
    rewards = trainer.reward_funcs[0]

    def reward(completions, index, **columns):
        given = rewards(completions=completions, **columns)
        return [r if prompt in prompts else 0.0 for r, prompt in zip(given, index, strict=True)]

    reward.__name__ = "accuracy"
    trainer.reward_funcs = [reward]
    return trainer


def run(make_trainer, how, prompts=(1,), **grpo):
    trainer = spoiled(
        make_trainer(recipe_of(grpo={"zero_variance_groups": how, **grpo}, train={"max_steps": 1})), prompts
    )
    keep, rows, asked = KeepGradients(), [], []
    trainer.add_callback(keep)
    trainer.model.get_base_model().model.language_model.register_forward_pre_hook(
        lambda module, args, options: (
            rows.append(options["inputs_embeds"].shape[:2]) if options.get("past_key_values") is None else None
        ),
        with_kwargs=True,
    )
    listener = APOCallback()
    listener.on_rollout = lambda step, scored: asked.extend(scored.rollout.indices)
    trainer.add_callback(listener)
    trainer.train()
    return logged(trainer)[0], keep.gradient, sum(height * width for height, width in rows), asked


def test_kept_groups_have_their_kl_and_skipped_ones_cost_nothing(make_trainer):
    kept, kept_gradient, kept_tokens, _ = run(make_trainer, "keep")
    skipped, skipped_gradient, skipped_tokens, _ = run(make_trainer, "skip")
    assert kept["zero_variance_groups"] == skipped["zero_variance_groups"] == 0.5
    assert (kept["skipped_groups"], skipped["skipped_groups"], skipped["resampled_groups"]) == (0, 1, 0)
    assert kept["length"] == skipped["length"]  # the same rollout
    assert skipped_tokens < 0.7 * kept_tokens
    # A fresh adapter has no KL: what is left is half the tokens that the mean is over.
    cosine = torch.nn.functional.cosine_similarity(kept_gradient, skipped_gradient, dim=0)
    assert cosine > 0.9999 and skipped_gradient.norm() > 1.2 * kept_gradient.norm()


@pytest.mark.parametrize("completions_per_pass", [8, 1])
def test_a_step_of_nothing_but_skipped_groups(make_trainer, completions_per_pass):
    figures, gradient, tokens, _ = run(make_trainer, "skip", (), completions_per_pass=completions_per_pass)
    assert figures["skipped_groups"] == 2 and figures["loss"] == 0 and figures["grad_norm"] == 0
    assert figures["skipped_nonfinite_steps"] == 0 and gradient.abs().max() == 0 and tokens == 0


def test_the_old_policy_is_not_asked_about_skipped_groups(make_trainer):
    grpo = {"num_iterations": 2, "zero_variance_groups": "skip"}
    trainer = spoiled(make_trainer(recipe_of(grpo=grpo, train={"max_steps": 2})), (1,))
    trainer.train()
    (batch,) = trainer._buffered_inputs
    is_scored = batch["old_per_token_logps"].abs().sum(dim=-1) > 0
    assert is_scored.tolist() == batch["completion_mask"].any(dim=-1).tolist() and 0 < is_scored.sum() < 8
    first, second = logged(trainer)
    assert first["clip_fraction"] == 0 and second["kl"] > first["kl"] == 0


def test_other_prompts_are_sampled_in_their_place(make_trainer):
    every = range(2, 16)  # all but the first two prompts of the data
    kept, _, _, asked = run(make_trainer, "keep", every)
    assert set(asked) == {0, 1} and kept["zero_variance_groups"] == 1
    figures, gradient, _, asked = run(make_trainer, "resample", every)
    assert figures["resampled_groups"] >= 2 and figures["zero_variance_groups"] == 0 and gradient.norm() > 0
    assert not {0, 1} & set(asked) and all(len(set(asked[i : i + 4])) == 1 for i in (0, 4))


def test_a_replaced_group_is_scored_behind_its_own_prompt(make_trainer):
    """The one that stays has the first number, as the replacement had among the prompts sampled for it."""
    recipe = recipe_of(grpo={"zero_variance_groups": "resample"}, train={"max_steps": 1})
    trainer = spoiled(make_trainer(recipe), {0, *range(2, 16)})  # the second prompt's group has no variance
    trainer.train()
    (batch,) = trainer._buffered_inputs
    assert batch["group"].tolist() == [0] * 4 + [1] * 4
    alone = {key: value for key, value in batch.items() if key not in ("group", "image_features")}
    with torch.no_grad(), reference_mode(trainer.model):
        expected, _ = token_logps(trainer.model, alone)
        other, _ = token_logps(trainer.model, batch | {"group": torch.zeros_like(batch["group"])})
    assert (other - expected).abs().max() > 1  # nats, behind the other prompt
    assert (batch["ref_logps"] - expected).abs().max() < 1e-4


def test_what_stays_without_variance_is_skipped(make_trainer):
    figures, *_ = run(make_trainer, "resample", ())
    assert figures["resampled_groups"] == 4 and figures["skipped_groups"] == 2  # two prompts, twice


def test_resampling_wants_one_process():
    recipe = recipe_of(grpo={"zero_variance_groups": "resample"})
    assert not list(combination_problems(recipe))
    assert any("zero_variance_groups" in problem for problem in combination_problems(recipe, num_processes=2))


def test_rows_are_replaced_with_their_images_and_padding(tiny_policy, make_batch):
    batch = make_batch(tiny_policy)
    other = make_batch(tiny_policy, sizes=((140, 140), (28, 28)), lengths=(20, 5), seed=1)
    merged = with_rows_replaced(batch, [0, 2], other)
    expected = {0: (other, 0), 1: (batch, 1), 2: (other, 1), 3: (batch, 3)}
    for number, row in enumerate(row_slices(merged, 1)):
        source, place = expected[number]
        alone = list(row_slices(source, 1))[place]
        for key in ("pixel_values", "image_grid_thw"):
            assert torch.equal(row[key], alone[key])
        for ids, mask in (("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask")):
            assert torch.equal(row[ids][row[mask].bool()], alone[ids][alone[mask].bool()])
        assert row["mm_token_type_ids"].sum() == alone["mm_token_type_ids"].sum()
    assert merged["prompt_mask"][:, -1].all() and merged["completion_mask"][:, 0].all()  # padded at the right ends
