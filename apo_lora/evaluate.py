"""Measuring a policy on held-out items: sample, verify, count. Before and after training, with the same seed."""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from apo_lora.data import Example
from apo_lora.model import Policy, vision_token_ids
from apo_lora.recipe import Recipe
from apo_lora.rewards import format_reward

PROMPTS_PER_PASS = 64

Score = Callable[[list[str], list[str], list[list[str] | None]], list[float]]


def evaluate(
    policy: Policy, examples: Sequence[Example], recipe: Recipe, score: Score, *, title: str
) -> dict[str, Any]:
    """One sampled completion per example at the recipe's temperature, verified by `score`.

    Returns accuracy with its 95 % Wilson interval, mean lengths (tokens) of right and wrong completions, and the
    fractions that are truncated and well formatted. Draws from its own random state: training is not disturbed.
    """
    rows = []
    with torch.random.fork_rng(), _generating(policy.model), tqdm(total=len(examples), desc=title, unit="item") as bar:
        torch.manual_seed(recipe.train.seed)
        for start in range(0, len(examples), PROMPTS_PER_PASS):
            batch = examples[start : start + PROMPTS_PER_PASS]
            completions = sample(policy, batch, recipe)
            right = score(
                [text for text, _, _ in completions],
                [example.answer for example in batch],
                [list(example.choices) if example.choices else None for example in batch],
            )
            rows += [
                (text, length, truncated, correct == 1)
                for (text, length, truncated), correct in zip(completions, right, strict=True)
            ]
            bar.update(len(batch))
    return _summary(rows)


@torch.no_grad()
def sample(policy: Policy, examples: Sequence[Example], recipe: Recipe) -> list[tuple[str, int, bool]]:
    """(completion, its length in tokens, whether it was cut) for each example."""
    processor, model = policy.processor, policy.model
    texts = [
        processor.apply_chat_template(example.messages(recipe.data), add_generation_prompt=True, tokenize=False)
        for example in examples
    ]
    images = [[image.open() for image in example.images] for example in examples]
    inputs = processor(
        text=texts, images=images if any(images) else None, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device)
    generation = model.generation_config
    output = model.generate(
        **inputs,
        do_sample=True,
        temperature=recipe.grpo.temperature,
        top_p=recipe.grpo.top_p,
        top_k=recipe.grpo.top_k,
        max_new_tokens=recipe.grpo.max_completion_length,
        suppress_tokens=vision_token_ids(processor),
    )[:, inputs["input_ids"].shape[1] :]
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    return [_until_end(ids, ends, processor) for ids in output.tolist()]


def _until_end(ids: list[int], ends: list[int], processor: Any) -> tuple[str, int, bool]:
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return processor.decode(ids[:length], skip_special_tokens=True), length, ids[length - 1] not in ends


@contextmanager
def _generating(model: nn.Module):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _summary(rows: list[tuple[str, int, bool, bool]]) -> dict[str, Any]:
    total, right = len(rows), sum(correct for *_, correct in rows)
    low, high = wilson_interval(right, total)
    return {
        "items": total,
        "accuracy": right / total,
        "accuracy_95_low": low,
        "accuracy_95_high": high,
        "length_correct": _mean([length for _, length, _, correct in rows if correct]),
        "length_wrong": _mean([length for _, length, _, correct in rows if not correct]),
        "truncated": _mean([cut for _, _, cut, _ in rows]),
        "well_formatted": _mean([format_reward(text) > 0 for text, *_ in rows]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def wilson_interval(successes: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): honest near 0 and 1 and for few items, where +-z*s is not."""
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)
