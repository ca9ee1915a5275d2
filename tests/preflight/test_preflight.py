"""Preflight: each check passes on a sound policy and fails on the fault that it is there for."""

from dataclasses import replace

import pytest
import torch

from apo_lora.data.examples import load_examples
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.preflight.checks import (
    check_agreement,
    check_generation,
    check_image,
    check_reference,
    check_shared_prompt,
    fit_largest,
    next_rung,
    preflight,
)
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.sampling import Forward

RECIPE = Recipe.model_validate(
    {
        "data": {"train": "boards"},
        "grpo": {"max_completion_length": 32, "prompts_per_step": 2, "num_generations": 4, "completions_per_pass": 8},
    }
)


@pytest.fixture(scope="module")
def examples():
    return load_examples("boards", RECIPE.data, split="train", limit=8).examples


def names(checks, ok):
    return [check.name for check in checks if check.ok is ok]


def test_a_sound_policy_passes(tiny_policy, examples):
    state = torch.get_rng_state()
    weights = {name: p.clone() for name, p in tiny_policy.model.named_parameters()}
    checks, recipe = preflight(tiny_policy, examples, RECIPE)
    assert len(checks) == 6 and not names(checks, ok=False), [check.line() for check in checks]
    assert recipe == RECIPE
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in tiny_policy.model.named_parameters())


def test_a_lost_image_is_found(tiny_policy, make_batch, monkeypatch):
    batch = make_batch(tiny_policy)
    assert check_image(tiny_policy, batch).ok
    inner = tiny_policy.model.get_base_model().model
    features = inner.get_image_features

    def blind(*args, **kwargs):
        output = features(*args, **kwargs)
        output.pooler_output = [torch.zeros_like(part) for part in output.pooler_output]
        return output

    monkeypatch.setattr(inner, "get_image_features", blind)
    assert not check_image(tiny_policy, batch).ok


def test_a_reference_that_is_not_the_base_is_found(tiny_policy, make_batch, stir_adapter):
    batch = make_batch(tiny_policy)
    assert check_reference(tiny_policy, batch).ok
    stir_adapter(tiny_policy.model)
    assert not check_reference(tiny_policy, batch).ok


def test_a_reference_may_round_in_16_bits_alone(tiny_policy, make_batch, stir_adapter):
    batch = make_batch(tiny_policy)
    stir_adapter(tiny_policy.model, scale=0.001)
    assert not check_reference(tiny_policy, batch).ok
    in_16_bits = replace(tiny_policy, dtype=torch.bfloat16)
    assert check_reference(in_16_bits, batch).ok
    stir_adapter(tiny_policy.model)
    assert not check_reference(in_16_bits, batch).ok


def test_scoring_unlike_sampling_is_found(tiny_policy, make_batch):
    from apo_lora.policy.scoring import token_logps

    batch = make_batch(tiny_policy)
    batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
    with torch.no_grad():
        sampled, _ = token_logps(tiny_policy.model, batch)
    assert check_agreement(tiny_policy, batch, sampled, RECIPE).ok
    assert not check_agreement(tiny_policy, batch, sampled + 0.01, RECIPE).ok


@pytest.mark.parametrize(
    ("forwards", "ok"),
    [
        ([Forward(50, True, False), Forward(1, True, False), Forward(1, True, False)], True),
        ([Forward(50, True, False), Forward(51, True, False)], False),  # a cache that is not used
        ([Forward(50, False, False), Forward(51, False, False)], False),
        ([Forward(50, True, True), Forward(1, True, True)], False),
        ([Forward(50, True, False), Forward(1, True, False), Forward(60, False, True)], True),  # scoring, afterwards
    ],
)
def test_slow_generation_is_found(forwards, ok):
    assert check_generation(forwards).ok is ok


def test_generation_without_its_cache_is_seen_in_the_model(tiny_policy, examples):
    tiny_policy.model.generation_config.use_cache = False
    checks, _ = preflight(tiny_policy, examples, RECIPE)
    assert names(checks, ok=False) == ["generation uses its cache"]


def fits_when(condition):
    """A pass on a pretended card."""
    seen = []

    def run_pass(policy, example, recipe):
        seen.append(recipe)
        if not condition(recipe):
            raise torch.OutOfMemoryError("pretended")

    run_pass.seen = seen
    return run_pass


def test_the_ladder_lowers_completions_per_pass_first(tiny_policy, examples):
    run_pass = fits_when(lambda recipe: recipe.grpo.completions_per_pass <= 2)
    check, recipe = fit_largest(tiny_policy, examples, RECIPE, run_pass)
    assert check.ok and recipe.grpo.completions_per_pass == 2
    assert recipe.grpo.num_generations == 4 and recipe.data.max_pixels is None
    assert (
        "grpo.completions_per_pass 8 did not fit, now 4; grpo.completions_per_pass 4 did not fit, now 2" in check.found
    )


def test_then_images_shrink_and_then_groups(tiny_policy, examples):
    run_pass = fits_when(lambda recipe: recipe.grpo.num_generations == 2)
    check, recipe = fit_largest(tiny_policy, examples, RECIPE, run_pass)
    assert check.ok and recipe.grpo.num_generations == 2 and recipe.grpo.completions_per_pass == 1
    assert recipe.data.max_pixels == 64 * 28 * 28
    assert tiny_policy.processor.image_processor.size["longest_edge"] == 64 * 28 * 28


def test_what_never_fits_is_said_with_what_helps(tiny_policy, examples):
    check, recipe = fit_largest(tiny_policy, examples, RECIPE, fits_when(lambda recipe: False))
    assert not check.ok and recipe == RECIPE
    assert "max_completion_length" in check.line()


def test_every_rung_is_a_valid_recipe():
    recipe, rungs = RECIPE, 0
    while (lower := next_rung(recipe, QWEN2_5_VL)) is not None:
        Recipe.model_validate(lower.model_dump())
        assert lower.completions_per_step % lower.grpo.completions_per_pass == 0
        recipe, rungs = lower, rungs + 1
    assert rungs >= 5


def test_the_pass_that_is_measured_is_at_full_length(tiny_policy, examples, monkeypatch):
    from apo_lora.preflight import checks as module

    shapes = []
    original = module.token_logps
    monkeypatch.setattr(
        module,
        "token_logps",
        lambda model, batch, **o: shapes.append(batch["completion_ids"].shape) or original(model, batch),
    )
    assert fit_largest(tiny_policy, examples, RECIPE)[0].ok
    assert shapes == [(8, 32)]


def test_a_shared_prompt_that_gives_something_else_is_not_used(tiny_policy, examples, monkeypatch):
    """The run goes on without it, and says so."""
    from apo_lora.policy.shared_prompt import attention as shared_attention

    checks, recipe = preflight(tiny_policy, examples, RECIPE)
    assert recipe.grpo.shared_prompt and "LoRA gradients by" in checks[0].found

    def completions_see_each_other(query, key, value, families, scaling):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)

    monkeypatch.setattr(shared_attention, "attend", completions_see_each_other)
    checks, recipe = preflight(tiny_policy, examples, RECIPE)
    assert checks[0].ok and "WARNING: not used: log-probs differ by" in checks[0].line()
    assert len(checks) == 6 and not names(checks, ok=False)
    assert recipe.grpo.shared_prompt is False
    assert recipe == RECIPE.model_copy(update={"grpo": RECIPE.grpo.model_copy(update={"shared_prompt": False})})


def test_a_shared_prompt_that_raises_is_not_used(tiny_policy, make_batch, examples, monkeypatch):
    from apo_lora.policy.shared_prompt import attention as shared_attention

    def no_kernel(*arguments):
        raise RuntimeError("no kernel image is available\nfor execution")

    batch = make_batch(tiny_policy)
    assert check_shared_prompt(tiny_policy, batch, examples, RECIPE)[1]
    monkeypatch.setattr(shared_attention, "attend", no_kernel)
    check, shares = check_shared_prompt(tiny_policy, batch, examples, RECIPE)
    assert check.ok and not shares and check.found.endswith("RuntimeError: no kernel image is available")
    assert all(p.grad is None for p in tiny_policy.model.parameters())


def test_a_model_that_cannot_share_prompts_is_named(tiny_policy, make_batch, examples):
    tiny_policy.model.get_base_model().config.model_type = "other_vl"
    check, shares = check_shared_prompt(tiny_policy, make_batch(tiny_policy), examples, RECIPE)
    assert check.ok and not shares and "other_vl" in check.found


def test_sampling_behind_the_wrong_prompt_is_found(tiny_policy, make_batch, examples, monkeypatch):
    from apo_lora.policy.shared_prompt import prefill as group_prefill

    copy_rows = group_prefill._copy_rows
    batch = make_batch(tiny_policy)
    check, shares = check_shared_prompt(tiny_policy, batch, examples, RECIPE)
    assert shares and "sampling with it differs by" in check.found
    monkeypatch.setattr(group_prefill, "_copy_rows", lambda cache, copies: copy_rows(cache, torch.zeros_like(copies)))
    check, shares = check_shared_prompt(tiny_policy, batch, examples, RECIPE)
    assert not shares and "WARNING: not used" in check.line() and "sampling with it differs by" in check.found


def test_sampling_that_raises_is_found(tiny_policy, make_batch, examples, monkeypatch):
    from apo_lora.policy.shared_prompt import prefill as group_prefill

    def no_such_cache(cache, copies):
        raise AttributeError("this cache has no layers")

    monkeypatch.setattr(group_prefill, "_copy_rows", no_such_cache)
    check, shares = check_shared_prompt(tiny_policy, make_batch(tiny_policy), examples, RECIPE)
    assert not shares and check.found.endswith("AttributeError: this cache has no layers")
    assert "forward" not in tiny_policy.model.get_base_model().model.__dict__
