"""Measuring a policy on held-out items: sample, verify, count. Before and after training, with the same seed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from apo_lora import ranks
from apo_lora.data.examples import Example
from apo_lora.model import Policy
from apo_lora.recipe import Recipe
from apo_lora.rewards.scores import format_reward
from apo_lora.sampling import Completion, sample

PROMPTS_PER_PASS = 64

Score = Callable[[list[str], list[str], list[list[str] | None]], list[float]]


def evaluate(
    policy: Policy, examples: Sequence[Example], recipe: Recipe, score: Score, *, title: str
) -> dict[str, Any]:
    """One sampled completion per example at the recipe's temperature, verified by `score`.

    Returns accuracy with its 95 % Wilson interval, mean lengths (tokens) of right and wrong completions, and the
    fractions that are truncated and well formatted. Draws from its own random state: training is not disturbed.
    Several processes share the examples out; each of them returns the whole.
    """
    completions, right = [], []
    own = examples[ranks.rank() :: ranks.num_processes()]
    bar = tqdm(total=len(own), desc=title, unit="item", disable=not ranks.is_main())
    with torch.random.fork_rng(), bar:
        torch.manual_seed(recipe.train.seed + ranks.rank())
        for start in range(0, len(own), PROMPTS_PER_PASS):
            batch = own[start : start + PROMPTS_PER_PASS]
            sampled = sample(policy, batch, recipe)
            right += score(
                [completion.text for completion in sampled],
                [example.answer for example in batch],
                [list(example.choices) if example.choices else None for example in batch],
            )
            completions += sampled
            bar.update(len(batch))
    return _summary(ranks.gathered(completions), [reward == 1 for reward in ranks.gathered(right)])


def _summary(completions: Sequence[Completion], right: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(right), len(right))
    return {
        "items": len(right),
        "accuracy": sum(right) / len(right),
        "accuracy_95_low": low,
        "accuracy_95_high": high,
        "length_correct": _mean([c.length for c, correct in zip(completions, right, strict=True) if correct]),
        "length_wrong": _mean([c.length for c, correct in zip(completions, right, strict=True) if not correct]),
        "truncated": _mean([c.truncated for c in completions]),
        "well_formatted": _mean([format_reward(c.text) > 0 for c in completions]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def wilson_interval(successes: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): honest near 0 and 1 and for few items, where +-z*s is not."""
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)
