"""Keys of a recipe that are each valid, but not together."""

import re
from collections.abc import Iterator

from apo_lora.family.lookup import reserved_tokens
from apo_lora.recipe.schema import BUILT_IN_REWARDS, Recipe


def combination_problems(recipe: Recipe, num_processes: int = 1) -> Iterator[str]:
    """Keys that are each valid but not together, or not with this many processes. Touches neither disk nor device."""
    grpo, apo, rewards = recipe.grpo, recipe.apo, recipe.rewards
    length = grpo.max_completion_length
    share, rest = divmod(recipe.completions_per_step, num_processes)
    if rest:
        yield (
            f"grpo.prompts_per_step: prompts_per_step x num_generations = {recipe.completions_per_step} completions "
            f"cannot be divided evenly among {num_processes} processes; use a multiple of {num_processes}"
        )
    elif share % grpo.completions_per_pass:
        among = f" / {num_processes} processes" if num_processes > 1 else ""
        yield (
            f"grpo.completions_per_pass: {grpo.completions_per_pass} does not divide prompts_per_step x num_generations"
            f"{among} = {share}; use one of {_divisors(share)}"
        )
    if recipe.prompts_per_rollout % grpo.prompts_per_step:
        yield (
            f"grpo.prompts_per_rollout: {grpo.prompts_per_rollout} must be a multiple of grpo.prompts_per_step = "
            f"{grpo.prompts_per_step}"
        )
    elif recipe.train.save_steps % recipe.steps_per_rollout:
        yield (
            f"train.save_steps: {recipe.train.save_steps} must be a multiple of {recipe.steps_per_rollout}, the steps "
            "per rollout; a checkpoint inside a rollout could not be resumed exactly"
        )
    yield from _measurement_problems(recipe)
    if grpo.zero_variance_groups == "resample" and num_processes > 1:
        yield "grpo.zero_variance_groups: resample needs whole groups in one process; use skip or keep"
    if apo.dads not in (None, "constant") and grpo.beta == 0:
        yield "apo.dads: has no effect with grpo.beta = 0; set grpo.beta above 0, or apo.dads to null"
    if grpo.reference == "start" and recipe.lora.start is None:
        yield "grpo.reference: start is the adapter in lora.start, which is null; give lora.start, or use base"
    if rewards.correct_by not in rewards.functions:
        yield f"rewards.correct_by: {rewards.correct_by!r} must be one of rewards.functions {list(rewards.functions)}"
    elif BUILT_IN_REWARDS.get(rewards.correct_by, rewards.correct_from) < rewards.correct_from:
        yield (
            f"rewards.correct_by: {rewards.correct_by!r} is at most {BUILT_IN_REWARDS[rewards.correct_by]:g} and never "
            f"reaches rewards.correct_from = {rewards.correct_from:g}; name another function"
        )
    if "overlong" in rewards.functions and rewards.overlong_cache(length) > length:
        yield (
            f"rewards.overlong_tokens: {rewards.overlong_tokens} must not exceed grpo.max_completion_length = {length}"
        )
    if twice := sorted({name for name in rewards.functions if rewards.functions.count(name) > 1}):
        yield f"rewards.functions: {', '.join(twice)} must not stand twice; give it a larger weight in rewards.weights"
    if rewards.weights is not None and len(rewards.weights) != len(rewards.functions):
        yield (
            f"rewards.weights: {len(rewards.weights)} weights for {len(rewards.functions)} functions; "
            "give one per function"
        )
    elif rewards.weights is not None and not any(rewards.weights):
        yield "rewards.weights: all are 0, so there is nothing to learn from; give at least one function another weight"
    for place in recipe.output.mirror:
        if place.startswith("hub:") and not re.fullmatch(r"hub:[\w.-]+/[\w.-]+", place):
            yield f"output.mirror: {place!r} is not a Hub repository; write hub:ORG/NAME"
    if recipe.rollout.engine == "vllm":
        yield from vllm_problems(recipe)
    elif recipe.rollout.ahead:
        yield "rollout.ahead: 1 needs a server that samples meanwhile; use rollout.engine=vllm, or 0"
    if not recipe.lora.target_modules:
        yield "lora.target_modules: must not be empty; name layers, or leave the key out to adapt all of them"
    for name in {"lm_head", "embed_tokens"} & set(recipe.lora.target_modules):
        yield f"lora.target_modules: {name} shares its weight with another layer and could not be merged; leave it out"
    for key in ("instruction", "system_prompt"):
        if found := next((token for token in reserved_tokens() if token in (getattr(recipe.data, key) or "")), None):
            yield f"data.{key}: contains {found}, which would start a turn or an image; leave it out"
    if (recipe.data.min_pixels or 0) > (recipe.data.max_pixels or float("inf")):
        yield f"data.min_pixels: {recipe.data.min_pixels} must not exceed data.max_pixels = {recipe.data.max_pixels}"


def _measurement_problems(recipe: Recipe) -> Iterator[str]:
    """Of what is measured during training."""
    train = recipe.train
    if train.eval_steps is None:
        for key, value in (("train.patience", train.patience), ("output.keep_best", recipe.output.keep_best)):
            if value:
                yield f"{key}: needs measurements during training; set train.eval_steps"
        return
    if recipe.data.eval is None or not train.evaluate:
        yield "train.eval_steps: needs items to measure; set data.eval, and train.evaluate to true"
    if train.eval_steps % recipe.steps_per_rollout:
        yield (
            f"train.eval_steps: {train.eval_steps} must be a multiple of {recipe.steps_per_rollout}, the steps per "
            "rollout; inside a rollout, training could not be stopped or resumed exactly"
        )


LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""What vLLM makes room for; a smaller adapter fits into a larger one."""


def vllm_problems(recipe: Recipe) -> Iterator[str]:
    """What keeps vLLM from sampling as the recipe asks, wherever its server is."""
    if recipe.lora.vision:
        yield "lora.vision: vLLM applies adapters only to language layers; use false, or rollout.engine=transformers"
    if recipe.lora.r > LORA_RANKS[-1]:
        yield f"lora.r: vLLM takes at most {LORA_RANKS[-1]}; lower it, or use rollout.engine=transformers"
    if recipe.rollout.ahead and recipe.rollout.importance_cap is None:
        yield "rollout.importance_cap: null leaves a rollout.ahead of 1 uncorrected; give a number such as 2.0"
    for url in () if recipe.rollout.servers == "auto" else recipe.rollout.servers:
        if not re.fullmatch(r"https?://[^/@\s]+", url):
            yield f"rollout.servers: {url!r} is not a server's URL; write http://HOST:PORT, its key in VLLM_API_KEY"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
