"""Answers from a vLLM server instead of the model's own generate(); the model itself only tells their entropy."""

from collections.abc import Sequence

import torch

from apo_lora.data.examples import Example
from apo_lora.policy.loading import Policy
from apo_lora.policy.scoring import token_logps
from apo_lora.preflight.sample import as_batch
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.sampling import Completion, prompt_inputs, until_end
from apo_lora.rollout.vllm.sampler import VllmSampler


class AnswersByVllm:
    """An Answers of measure.py. `model`: base or tuned, which the policy must be switched to as well."""

    def __init__(self, sampler: VllmSampler, model: str):
        self.sampler, self.step = sampler, None if model == "base" else 0

    @torch.no_grad()
    def __call__(
        self, policy: Policy, examples: Sequence[Example], recipe: Recipe, greedy: bool
    ) -> tuple[list[Completion], list[float]]:
        inputs = prompt_inputs(policy, examples, recipe)
        masks = inputs["attention_mask"].bool()
        prompt_ids = [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
        items = [{"prompt": e.messages(recipe.data), "images": [i.open() for i in e.images]} for e in examples]
        changes = {"temperature": 0.0} if greedy else {}
        completions, _ = self.sampler(policy.model, self.step, items, prompt_ids, range(len(examples)), **changes)
        lengths = torch.tensor([len(ids) for ids in completions])
        rows = [torch.tensor(ids) for ids in completions]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(policy.model.device)
        batch = as_batch(inputs, padded, examples)
        batch["completion_mask"] = (torch.arange(padded.shape[1]) < lengths.unsqueeze(1)).long().to(padded.device)
        with policy.autocast():
            entropies = token_logps(policy.model, batch, rows_per_pass=recipe.grpo.completions_per_pass)[1]
        means = [row[:length].mean().item() for row, length in zip(entropies, lengths, strict=True)]
        ends = self.sampler.options["stop_token_ids"]
        return [until_end(ids, ends, policy.processor) for ids in completions], means
