"""Answers from a vLLM server instead of the model's own generate(); the model itself only tells their entropy."""

from collections.abc import Sequence

import torch

from apo_lora.data.examples import Example
from apo_lora.policy.loading import Policy
from apo_lora.policy.scoring import token_logps
from apo_lora.preflight.sample import sample_by_vllm
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.sampling import Completion, until_end
from apo_lora.rollout.vllm.sampler import VllmSampler


class AnswersByVllm:
    """An Answers of measure.py. `model`: base or tuned, which the policy must be switched to as well."""

    def __init__(self, sampler: VllmSampler, model: str):
        self.sampler, self.step = sampler, None if model == "base" else 0

    @torch.no_grad()
    def __call__(
        self, policy: Policy, examples: Sequence[Example], recipe: Recipe, greedy: bool
    ) -> tuple[list[Completion], list[float]]:
        changes = {"temperature": 0.0} if greedy else {}
        batch, sampled = sample_by_vllm(self.sampler, policy, examples, recipe, self.step, **changes)
        with policy.autocast():
            entropies = token_logps(policy.model, batch, rows_per_pass=recipe.grpo.completions_per_pass)[1]
        means = [row[: len(ids)].mean().item() for row, ids in zip(entropies, sampled.ids, strict=True)]
        ends = self.sampler.options["stop_token_ids"]
        return [until_end(ids, ends, policy.processor) for ids in sampled.ids], means
