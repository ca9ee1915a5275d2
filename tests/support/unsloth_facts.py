"""Runs in a fresh interpreter for test_unsloth.py: what APOTrainer does on Unsloth's rewritten trainer, as facts.

    python unsloth_facts.py facts.json BASE [4bit] [others]

Shape suffixes: B sequences of a micro-batch, T completion tokens, V vocabulary.
"""

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from unsloth_on_cpu import load_tiny, start

start()

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_trainer import processed_images  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from trl import GRPOConfig  # noqa: E402

from apo_lora.config import APOConfig  # noqa: E402
from apo_lora.data.examples import load_examples  # noqa: E402
from apo_lora.data.items import prompt_dataset  # noqa: E402
from apo_lora.errors import ModelError  # noqa: E402
from apo_lora.policy.batches import pixels  # noqa: E402
from apo_lora.policy.loading import Policy, _load_with_unsloth, reference_mode  # noqa: E402
from apo_lora.policy.scoring import token_logps  # noqa: E402
from apo_lora.policy.shared_prompt import attention as shared_attention  # noqa: E402
from apo_lora.policy.shared_prompt.attention import PromptGroup, PromptGroups  # noqa: E402
from apo_lora.preflight.shared_prompt import compare_shared_prompt  # noqa: E402
from apo_lora.recipe.schema import LoraSection, ModelSection, Recipe  # noqa: E402
from apo_lora.rollout.sampling import generating, prompt_inputs  # noqa: E402
from apo_lora.rollout.training_arguments import changed_values, config_values, training_arguments  # noqa: E402
from apo_lora.run.directory import RunDir  # noqa: E402
from apo_lora.trainer import APOTrainer  # noqa: E402
from benchmarks.gpu.witness import (  # noqa: E402
    Backward,
    Batch,
    differences,
    loss_and_gradient,
    our_backward,
    stir,
    unsloth_backward,
)

IMAGE_SIZES = ((84, 84), (112, 56), (56, 140), (140, 84))
BETA, EPSILON, TEMPERATURE, GROUP = 0.1, 0.2, 0.9, 4


def recipe_of(base: str, load_in_4bit: bool) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": base, "engine": "unsloth", "load_in_4bit": load_in_4bit, "gradient_checkpointing": True},
            "data": {"train": "problems.jsonl"},
            "rewards": {"functions": ("accuracy",)},
            "grpo": {
                "num_generations": GROUP, "prompts_per_step": 4, "completions_per_pass": 2 * GROUP,
                "max_completion_length": 48, "beta": BETA, "epsilon": EPSILON, "temperature": TEMPERATURE,
            },
            "apo": {"dads": "complement_exp", "stcr": 1.05},
            "train": {"max_steps": 2, "learning_rate": 1e-3, "seed": 3},
        }
    )  # fmt: skip


def write_problems() -> None:
    """Problems with an image of another size each."""
    with Path("problems.jsonl").open("w") as file:
        for number, size in enumerate(IMAGE_SIZES):
            pixels = random.Random(number).randbytes(size[0] * size[1] * 3)
            Image.frombytes("RGB", size, pixels).save(f"{number}.png")
            row = {"problem": "How many circles are there?" * (number + 1), "answer": "3", "image": f"{number}.png"}
            file.write(json.dumps(row) + "\n")


def accuracy(completions: list[str], **columns: Any) -> list[float]:
    """The shortest of each group is right: so every group is mixed, and what is wrong rambles."""
    assert all(isinstance(completion, str) for completion in completions)  # Unsloth hands over strings
    lengths = torch.tensor([len(completion) for completion in completions]).view(-1, GROUP)
    return (lengths.argsort(stable=True).argsort() == 0).float().flatten().tolist()


def build_trainer(recipe: Recipe, policy: Policy) -> APOTrainer:
    run_dir = RunDir(Path("run").absolute())
    run_dir.create()
    examples = load_examples(recipe.data.train, recipe.data, split="train").examples
    return APOTrainer(
        policy.model,
        [accuracy],
        training_arguments(recipe, policy, run_dir.checkpoints, recipe.train.max_steps),
        processing_class=policy.processor,
        train_dataset=prompt_dataset(examples, recipe.data),
    )


# --- what is loaded, configured and trained --------------------------------------------------------------------------


def loaded(model: nn.Module) -> dict[str, Any]:
    adapted = {name: m.base_layer for name, m in model.named_modules() if hasattr(m, "base_layer")}
    tower = [m for name, m in model.named_modules() if "visual" in name and hasattr(m, "weight")]
    head = model.get_output_embeddings()
    return {
        "adapted": {name: type(layer).__name__ for name, layer in adapted.items()},
        "tower_types": sorted({type(m).__name__ for m in tower}),
        "dtypes": sorted({str(m.weight.dtype) for m in (*tower, head)}),
        "head": type(head).__name__,
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
    }


def other_loads() -> dict[str, Any]:
    half, _ = _load_with_unsloth(ModelSection(name="tiny"), LoraSection(), None, torch.float16, 0)
    try:
        refusal = load_tiny({"dtype": "bfloat16"}).summary
    except ModelError as error:
        refusal = str(error)
    return {"vision": loaded(load_tiny(lora={"vision": True}).model), "float16": loaded(half), "bfloat16": refusal}


def configured(recipe: Recipe, policy: Policy) -> dict[str, Any]:
    """What becomes of values where the base of APOConfig is Unsloth's class."""

    def defaults(config: Any) -> list[Any]:
        return [config.optim, config.warmup_steps, config.use_bias_correction_kl]

    values = config_values(recipe, policy, Path("checkpoints"), 2)
    return {
        "is_unsloth": hasattr(APOConfig, "unsloth_num_chunks"),
        "unsloth's defaults": defaults(GRPOConfig(output_dir="checkpoints")),
        "our defaults": defaults(APOConfig(output_dir="checkpoints", use_cpu=True, bf16=False)),
        "changed": changed_values(APOConfig(**values), values),
    }


def checkpointing_after_generation(policy: Policy, recipe: Recipe) -> dict[str, bool]:
    model = policy.model
    examples = load_examples(recipe.data.train, recipe.data, split="train").examples
    inputs = prompt_inputs(policy, examples[:1], recipe)

    def is_on() -> bool:
        return all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))

    seen = {"loaded": is_on()}
    with generating(model):
        model.generate(**inputs, max_new_tokens=2)
        seen["inside"] = is_on()
    seen["sampled by us"] = is_on()
    model.generate(**inputs, max_new_tokens=2)
    model.train()
    seen["sampled by Unsloth"] = is_on()
    return seen


def adapter(policy: Policy) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in policy.model.parameters() if p.requires_grad])


@contextmanager
def watched_layers(policy: Policy) -> Iterator[set[str]]:
    """In which states the language model ran."""
    seen = set()

    def watch(module: Any, arguments: tuple, options: dict) -> None:
        what = "training" if torch.is_grad_enabled() else "scoring"
        what = "generating" if options.get("past_key_values") is not None else what
        seen.add(f"{what}: checkpointing {'on' if module.gradient_checkpointing and module.training else 'off'}")

    language_model = policy.model.get_base_model().model.language_model
    hook = language_model.register_forward_pre_hook(watch, with_kwargs=True)
    yield seen
    hook.remove()


@contextmanager
def counted_rows(policy: Policy) -> Iterator[dict[str, set[int]]]:
    """With how many rows the language model reads prompts and writes completions."""
    rows: dict[str, set[int]] = {"reading": set(), "writing": set()}

    def watch(module: Any, arguments: tuple, options: dict) -> None:
        if options.get("past_key_values") is not None:
            height, length, _ = options["inputs_embeds"].shape
            rows["reading" if length > 1 else "writing"].add(height)

    language_model = policy.model.get_base_model().model.language_model
    hook = language_model.register_forward_pre_hook(watch, with_kwargs=True)
    yield rows
    hook.remove()


def train(trainer: APOTrainer, policy: Policy) -> dict[str, Any]:
    """Trains two steps and watches."""
    batches: list[Batch] = []

    def watch_loss(model: Any, inputs: Batch, **options: Any) -> Tensor:
        batches.append(inputs)
        return compute_loss(model, inputs, **options)

    compute_loss, trainer.compute_loss = trainer.compute_loss, watch_loss
    fresh = adapter(policy)
    with watched_layers(policy) as seen, counted_rows(policy) as rows, processed_images(policy.processor) as images:
        trainer.train()
    trainer.compute_loss = compute_loss
    with torch.no_grad():
        trained, _ = token_logps(policy.model, batches[0], temperature=TEMPERATURE)
    with reference_mode(policy.model):
        reference, _ = token_logps(policy.model, batches[0], temperature=TEMPERATURE)
    return {
        "logs": [log for log in trainer.state.log_history if "reward" in log],
        "moved": (adapter(policy) - fresh).abs().max().item(),
        "reference_minus_base": (reference - batches[0]["ref_logps"]).abs().max().item(),
        "policy_minus_base": (trained - batches[0]["ref_logps"]).abs().max().item(),
        "layers": sorted(seen),
        "rows": {what: sorted(counts) for what, counts in rows.items()},
        "image_grids": [batch["image_grid_thw"].tolist() for batch in batches],
        "images_processed": images,
        "pixels_kept": [len({part.data_ptr() for part in batch["pixel_values"]}) for batch in batches],
    }


# --- the same loss, three ways ---------------------------------------------------------------------------------------


def rollout(trainer: APOTrainer) -> list[Batch]:
    """The micro-batches of one step, as Unsloth samples and APOTrainer splits them."""
    trainer.model.train()
    trainer._step, trainer._buffered_inputs = 0, None
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer._buffered_inputs


def full_logps(model: Any, batch: Batch) -> Tensor:
    """From the full [B, L, V] logits, in float64. Image tokens are found by their id."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    width = batch["completion_ids"].shape[1]
    logits_BTV = model(
        input_ids=ids,
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        mm_token_type_ids=(ids == model.config.image_token_id).long(),
        pixel_values=pixels(batch),
        image_grid_thw=batch["image_grid_thw"],
    ).logits[:, -width - 1 : -1]
    log_softmax_BTV = torch.log_softmax(logits_BTV.double() / TEMPERATURE, dim=-1)
    return log_softmax_BTV.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def naive_backward(trainer: APOTrainer, batches: list[Batch]) -> float:
    """shared/apo.md's loss, written down once more."""
    num_tokens = sum(batch["completion_mask"].sum() for batch in batches)
    num_sequences = sum(len(batch["completion_mask"]) for batch in batches)
    total = 0.0
    for batch in batches:
        with reference_mode(trainer.model):
            ref_BT = full_logps(trainer.model, batch)
        logps_BT, mask_BT = full_logps(trainer.model, batch), batch["completion_mask"].double()
        ratio_BT = (logps_BT - batch.get("old_per_token_logps", logps_BT.detach())).exp()
        a_B1 = batch["advantages"].double().unsqueeze(1)
        surrogate_BT = torch.min(ratio_BT * a_B1, ratio_BT.clamp(1 - EPSILON, 1 + EPSILON) * a_B1)
        kl_BT = (ref_BT - logps_BT).exp() - (ref_BT - logps_BT) - 1
        kl_B = (kl_BT * mask_BT).sum(1) / mask_BT.sum(1)
        loss = -(surrogate_BT * mask_BT).sum() / num_tokens
        loss = loss + BETA * (batch["kl_weights"] * kl_B).sum() / num_sequences
        loss.backward()
        total += loss.item()
    return total


def compare(trainer: APOTrainer, batches: list[Batch]) -> dict[str, list[float]]:
    """(loss, LoRA gradient) of each way, as relative differences from ours."""
    ours = loss_and_gradient(trainer, batches, our_backward)
    witnesses: dict[str, Backward] = {
        "naive": naive_backward,
        "unsloth": unsloth_backward,
        "unsloth without w": partial(unsloth_backward, weighted=False),
    }
    return {
        name: differences(ours, loss_and_gradient(trainer, batches, backward)) for name, backward in witnesses.items()
    }


def agreement(trainer: APOTrainer, policy: Policy) -> dict[str, Any]:
    stir(policy.model, scale=0.02)
    batches = rollout(trainer)
    sharing = shared_prompt(policy, batches)
    with torch.no_grad():
        scored = [token_logps(policy.model, batch, temperature=TEMPERATURE)[0] for batch in batches]
    figures: dict[str, Any] = {
        "largest_log_ratio": max((b["ref_logps"] - s).abs().max().item() for b, s in zip(batches, scored, strict=True)),
        "dads_weight": trainer.rollout_figures["dads_weight_positives"],
        "stcr_multiplier": trainer.rollout_figures["stcr_multiplier"],
        "completion_lengths": torch.cat([batch["completion_mask"].sum(1) for batch in batches]).tolist(),
        "on_policy": compare(trainer, batches),
        "shared_prompt": sharing,
    }
    generator = torch.Generator().manual_seed(1)
    for batch, logps in zip(batches, scored, strict=True):  # as if an older policy had sampled: some ratios are clipped
        batch["old_per_token_logps"] = logps + 0.3 * torch.randn(logps.shape, generator=generator)
    figures["off_policy"] = compare(trainer, batches)
    figures["clip_fraction"] = trainer.step_figures.loss_shares["clip_fraction"]
    return figures


# --- a shared prompt -------------------------------------------------------------------------------------------------


def shared_prompt(policy: Policy, batches: list[Batch]) -> dict[str, Any]:
    """Log-probs and LoRA gradients of the rollout's passes, behind shared prompts and behind prompts alone."""

    def score(alone: bool) -> tuple[Tensor, Tensor]:
        policy.model.zero_grad()
        scored = []
        for batch in batches:
            rows = {key: value for key, value in batch.items() if not alone or key not in ("group", "image_features")}
            logps, entropies = token_logps(policy.model, rows, temperature=TEMPERATURE, entropy_gradient=True)
            (logps * batch["advantages"].unsqueeze(1) + 0.1 * entropies).sum().backward()
            scored.append(logps.detach())
        gradients = [p.grad.double().flatten().clone() for p in policy.model.parameters() if p.requires_grad]
        policy.model.zero_grad()
        return torch.cat(scored), torch.cat(gradients)

    def difference(one: Tensor, other: Tensor) -> float:
        return ((one - other).norm() / other.norm()).item()

    policy.model.train()
    with watched_layers(policy) as seen:
        (logps, gradient), (expected_logps, expected_gradient) = score(alone=False), score(alone=True)
    attend = shared_attention.attend
    shared_attention.attend = lambda query, key, value, groups, scaling: attend(
        query, key, value, PromptGroups(PromptGroup(query.shape[2], ())), scaling
    )
    try:
        faulty_logps, faulty_gradient = score(alone=False)
    finally:
        shared_attention.attend = attend
    return {
        "obstacle": shared_attention.obstacle(policy.model),
        "shared": [batch.get("image_features") is not None and len(set(batch["group"].tolist())) for batch in batches],
        "layers": sorted(seen),
        "logps": difference(logps, expected_logps),
        "gradient": difference(gradient, expected_gradient),
        "completions see each other": [
            difference(faulty_logps, expected_logps), difference(faulty_gradient, expected_gradient)
        ],
        "check": compare_shared_prompt(policy, batches[0]),
    }  # fmt: skip


def main(target: str, base: str, *options: str) -> None:
    write_problems()
    recipe = recipe_of(base, load_in_4bit="4bit" in options)
    policy = load_tiny(recipe.model.model_dump(include={"name", "load_in_4bit", "gradient_checkpointing"}))
    facts: dict[str, Any] = {"summary": policy.summary, "loaded": loaded(policy.model)}
    facts["checkpointing"] = checkpointing_after_generation(policy, recipe)
    facts["config"] = configured(recipe, policy)
    trainer = build_trainer(recipe, policy)
    facts["bases"] = [f"{cls.__module__}.{cls.__name__}" for cls in type(trainer).__mro__]
    facts["trained"] = train(trainer, policy)
    facts["agreement"] = agreement(trainer, policy)
    if "others" in options:
        facts.update(other_loads())
    Path(target).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
