"""Before step 1: does the policy see its images, is the reference the base, does scoring agree with sampling and with
itself where prompts are shared, and does the largest example fit in memory?

Each of these has wasted a night of training: a scoring pass that silently lost the image, a reference that was not the
base, generation without its cache, an out-of-memory error at step 120.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apo_lora.apo import token_kl
from apo_lora.data.examples import Example, prompt_lengths
from apo_lora.errors import TrainingStopped
from apo_lora.family.record import Family
from apo_lora.machine import ranks
from apo_lora.machine.memory import peak_memory, reset_peak_memory
from apo_lora.policy.loading import Policy, limit_image_size, reference_mode
from apo_lora.policy.scoring import token_logps
from apo_lora.preflight.sample import SAMPLE_TOKENS, as_batch, random_adapter, sample_by_vllm, short_sample
from apo_lora.preflight.shared_prompt import compare_shared_prompt, compare_shared_reading
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.sampling import Forward, generation_fault, prompt_inputs, without_dropout
from apo_lora.rollout.vllm.sampler import VllmSampler
from apo_lora.rollout.vllm.server import Servers
from apo_lora.run.figures import ALARM_DIFFERENCE

MIN_IMAGE_TOKENS = 64
"""Preflight never shrinks images below this: much smaller, and they become unreadable."""

SAMPLE_EXAMPLES = 4

SERVER_CHECK = "vLLM samples from the trainer's policy"

# Mean difference, in nats per token, between a token's log-prob while sampling and when scored. In 16 bits the two
# passes round differently (other batch shapes, other kernels); over this they are not the same policy.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    remedy: str = ""

    def line(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name}: {self.found}" + ("" if self.ok else f"; {self.remedy}")


def preflight(
    policy: Policy, examples: Sequence[Example], recipe: Recipe, servers: Servers | None = None
) -> tuple[list[Check], Recipe]:
    """The checks, and the recipe as this machine can train it: with smaller passes or images where the largest example
    does not fit, and without grpo.shared_prompt where that gives a different result; otherwise unchanged.

    Leaves weights, gradients and random state as they were.
    """
    with torch.random.fork_rng(), without_dropout(policy.model):
        torch.manual_seed(recipe.train.seed)
        batch, sampled_logps, forwards = short_sample(policy, examples[:SAMPLE_EXAMPLES], recipe)
        sharing, starts_elsewhere = [], recipe.lora.start and recipe.grpo.reference == "base"
        if recipe.grpo.shared_prompt:
            check, shares = check_shared_prompt(policy, batch, examples, recipe)
            sharing.append(check)
            if shares:  # the checks below then score as training does
                batch["group"] = torch.arange(len(batch["prompt_ids"]), device=policy.model.device)
            else:
                recipe = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"shared_prompt": False})})
        checks = [
            *sharing,
            check_generation(forwards),
            check_agreement(policy, batch, sampled_logps, recipe),
            (check_start if starts_elsewhere else check_reference)(policy, batch),
            *([check_image(policy, batch)] if batch.get("pixel_values") is not None else []),
            *([check_server(policy, examples[:SAMPLE_EXAMPLES], recipe, servers)] if servers else []),
        ]
        memory, recipe = fit_largest(policy, examples, recipe)
    return [*checks, memory], recipe


def _score(policy: Policy, batch: dict, **options: Any) -> tuple[Tensor, Tensor]:
    """As the trainer scores: what is checked and measured here must be what will run."""
    with policy.autocast():
        return token_logps(policy.model, batch, **options)


# --- sampling against scoring ----------------------------------------------------------------------------------------


def check_generation(forwards: Sequence[Forward]) -> Check:
    fault = generation_fault(forwards)
    return Check(
        "generation uses its cache",
        fault is None,
        fault or f"{len(forwards)} forward passes, one token each after the prompt",
        "generation would take minutes instead of seconds; set use_cache in the model's generation_config.json",
    )


def check_agreement(policy: Policy, batch: dict, sampled_logps: Tensor, recipe: Recipe) -> Check:
    with torch.no_grad():
        scored, _ = _score(policy, batch, temperature=recipe.grpo.temperature)
    difference, limit = (scored - sampled_logps).abs().mean().item(), AGREEMENT[policy.dtype]
    return Check(
        "scoring agrees with sampling",
        difference <= limit,
        f"{difference:.1e} nats per token on average, at most {limit:.0e}",
        "the policy that is trained is not the policy that samples; report this with the output of `pip freeze`",
    )


def check_reference(policy: Policy, batch: dict) -> Check:
    """Of a policy that starts at its reference: a fresh adapter, or any where that is grpo.reference=start."""
    difference, kl = _from_reference(policy, batch)
    # An adapter whose B is 0 adds exactly 0. In 16 bits, kernels with and without adapters may still round differently.
    limit = 0 if policy.dtype == torch.float32 else AGREEMENT[policy.dtype]
    return Check(
        "the policy starts at its reference",
        difference <= limit,
        kl + (f" ({difference:.1e} nats per token apart, at most {limit:.0e})" if difference else ""),
        "switching adapters does not give the reference; set lora.dropout to 0 and install the tested peft version",
    )


def check_start(policy: Policy, batch: dict) -> Check:
    """Of a policy that starts at lora.start and stays near the base."""
    difference, kl = _from_reference(policy, batch)
    remedy = "an adapter without effect was never trained, or belongs to another model; give another, or leave it out"
    return Check("the adapter in lora.start changes the base", difference > 0, kl, remedy)


def _from_reference(policy: Policy, batch: dict) -> tuple[float, str]:
    """Nats per token on average between the policy and its reference, and their KL in words."""
    with torch.no_grad():
        own, _ = _score(policy, batch)
    with reference_mode(policy.model):
        reference, _ = _score(policy, batch)
    kl = token_kl(own, reference).mean().item()
    return (own - reference).abs().mean().item(), f"KL to the reference starts at {kl:.1g}"


def check_image(policy: Policy, batch: dict) -> Check:
    """log p(completion | image) must differ from log p(completion | blank image)."""
    blank = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
    with torch.no_grad():
        difference = _score(policy, batch)[0] - _score(policy, blank)[0]
    found = difference.abs().max().item()
    return Check(
        "scoring sees the image",
        found > 1e-4,
        f"a blank image changes log-probs by up to {found:.2g} nats",
        "the image does not reach the model; check the data with `apo-lora check-data`",
    )


def check_server(policy: Policy, examples: Sequence[Example], recipe: Recipe, servers: Servers) -> Check:
    """vLLM must read the trainer's prompts and sample with the adapter: a random one here, a fresh one does nothing."""
    sampler = VllmSampler(servers, policy, recipe, then="Check it with `apo-lora doctor`")
    # From the whole distribution: its log-probs are otherwise those within top_p and top_k, and the trainer's are not.
    unrestricted = {"max_tokens": SAMPLE_TOKENS, "top_p": 1.0, "top_k": 0}
    try:
        with random_adapter(policy.model), torch.no_grad():
            batch, sampled = sample_by_vllm(sampler, policy, examples, recipe, 0, **unrestricted)
            scored, _ = _score(policy, batch, temperature=recipe.grpo.temperature)
            with reference_mode(policy.model):
                reference, _ = _score(policy, batch, temperature=recipe.grpo.temperature)
    except TrainingStopped as stop:
        return Check(SERVER_CHECK, False, stop.problems[0], "nothing is trained")
    inside = batch["completion_mask"].bool()
    theirs = torch.tensor(sum(sampled.logps, []), device=scored.device)
    apart = (scored[inside] - theirs).abs().mean().item()
    moved = (scored[inside] - reference[inside]).abs().mean().item()
    limit = min(ALARM_DIFFERENCE, max(AGREEMENT[policy.dtype], moved / 2))  # `moved`, if the adapter were not applied
    return Check(
        SERVER_CHECK,
        apart <= limit,
        f"{len(examples)} prompts read alike; log-probs of {len(theirs)} tokens {apart:.1e} nats apart on average, at "
        f"most {limit:.0e}, where an adapter moves them by {moved:.1e}",
        "the server holds another base or applies the adapter otherwise; check rollout.quantization and "
        "lora.target_modules, or use rollout.engine=transformers",
    )


def check_shared_prompt(policy: Policy, batch: dict, examples: Sequence[Example], recipe: Recipe) -> tuple[Check, bool]:
    """Whether grpo.shared_prompt gives the same result. Never fails: without it training is slower, and the same."""
    same, found = compare_shared_prompt(policy, batch)
    if same and recipe.rollout.engine == "transformers":
        same, found_sampling = compare_shared_reading(policy, examples, recipe)
        found = f"{found}; {found_sampling}"
    same = not ranks.any_rank(not same)
    return Check("a shared prompt gives the same result", True, found if same else f"WARNING: not used: {found}"), same


# --- memory ----------------------------------------------------------------------------------------------------------


def fit_largest(
    policy: Policy,
    examples: Sequence[Example],
    recipe: Recipe,
    run_pass: Callable[[Policy, Example, Recipe], None] | None = None,
) -> tuple[Check, Recipe]:
    """Lowers the memory settings step by step until a forward and backward pass of the longest prompt fits, on every
    process. Never raises for lack of memory.
    """
    run_pass = run_pass or forward_and_backward
    given, steps = recipe, []
    while True:
        limit_image_size(policy.processor, recipe.data)
        lengths = prompt_lengths(examples, policy.processor, recipe.data)
        longest = max(range(len(examples)), key=lengths.__getitem__)
        reset_peak_memory()
        try:
            run_pass(policy, examples[longest], recipe)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        if ranks.any_rank(not fits):
            lower = next_rung(recipe, policy.family, ranks.num_processes())
            if lower is None:
                return _does_not_fit(examples[longest]), given
            steps.append(ladder_step(recipe, lower))
            recipe = lower
            continue
        found = (
            f"row {examples[longest].row} ({lengths[longest]:,} prompt tokens) with "
            f"{recipe.grpo.completions_per_pass} x {recipe.grpo.max_completion_length:,} completion tokens, "
            f"peak {peak_memory() / 2**30:.2f} GiB"
        )
        return Check("the largest example fits", True, "; ".join([*steps, found])), recipe


def forward_and_backward(policy: Policy, example: Example, recipe: Recipe) -> None:
    """One training pass of the example at full completion length; gradients are dropped again."""
    rows = [example] * recipe.grpo.completions_per_pass
    inputs = prompt_inputs(policy, rows, recipe)
    shape = (len(rows), recipe.grpo.max_completion_length)
    # Any ordinary token does: memory and time do not depend on which. The end token is one, and no vision token.
    completion_ids = torch.full(shape, policy.processor.tokenizer.eos_token_id, device=policy.model.device)
    was_training = policy.model.training
    try:
        policy.model.train()
        entropy_coef = recipe.apo.entropy_coef
        batch = as_batch(inputs, completion_ids, rows)
        if recipe.grpo.shared_prompt:
            batch["group"] = torch.zeros(len(rows), dtype=torch.long, device=policy.model.device)
        logps, entropies = _score(policy, batch, entropy_gradient=entropy_coef > 0)
        (logps.mean() + entropy_coef * entropies.mean()).backward()
    finally:
        policy.model.train(was_training)
        policy.model.zero_grad(set_to_none=True)


def next_rung(recipe: Recipe, family: Family, num_processes: int = 1) -> Recipe | None:
    """The next cheaper recipe: completions per pass (same result), then image size, then generations per prompt."""
    grpo, data = recipe.grpo, recipe.data
    if grpo.completions_per_pass > 1:
        share = recipe.completions_per_step // num_processes
        smaller = max(d for d in range(1, grpo.completions_per_pass // 2 + 1) if share % d == 0)
        return recipe.model_copy(update={"grpo": grpo.model_copy(update={"completions_per_pass": smaller})})
    least = MIN_IMAGE_TOKENS * family.pixels_per_token
    # Without a limit in the recipe the processor allows more than any GPU has memory for: start at an eighth.
    pixels = max(least, (data.max_pixels or family.max_image_tokens * family.pixels_per_token // 4) // 2)
    if data.max_pixels is None or pixels < data.max_pixels:
        return recipe.model_copy(update={"data": data.model_copy(update={"max_pixels": pixels})})
    fewer = range(max(2, grpo.num_generations // 2), 1, -1) if grpo.num_generations > 2 else ()
    for generations in fewer:
        if grpo.prompts_per_step * generations % num_processes == 0:
            return recipe.model_copy(update={"grpo": grpo.model_copy(update={"num_generations": generations})})
    return None


LADDER = ("grpo.completions_per_pass", "data.max_pixels", "grpo.num_generations")


def ladder_step(before: Recipe, after: Recipe) -> str:
    changes = []
    for key in LADDER:
        section, name = key.split(".")
        old, new = getattr(getattr(before, section), name), getattr(getattr(after, section), name)
        if old != new:
            changes.append(f"{key} {'unlimited' if old is None else old} did not fit, now {new}")
    return ", ".join(changes)


def _does_not_fit(example: Example) -> Check:
    return Check(
        "the largest example fits",
        False,
        f"row {example.row} does not fit, even with one completion per pass and the smallest images",
        "lower grpo.max_completion_length or data.max_prompt_tokens, set model.load_in_4bit and "
        "model.gradient_checkpointing, or use a larger GPU (`apo-lora plan` estimates the memory needed)",
    )
