"""A few short completions with the log-probs that they were sampled with: what preflight compares scoring with."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apo_lora.data.examples import Example
from apo_lora.family.lookup import inner_model_of
from apo_lora.policy.loading import Policy
from apo_lora.policy.shared_prompt.prefill import prompts_read_once
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.sampling import (
    Forward,
    Sampled,
    generating,
    generation_options,
    prompt_inputs,
    watched_forwards,
)
from apo_lora.rollout.vllm.sampler import VllmSampler

SAMPLE_TOKENS = 16


def short_sample(
    policy: Policy, examples: Sequence[Example], recipe: Recipe, groups: Sequence[int] | None = None
) -> tuple[dict[str, Any], Tensor, list[Forward]]:
    """A batch of short sampled completions, their log-probs while sampling (B, T), and the forward passes.

    With `groups`, one number per example, prompts of the same number are read once, as in training.
    """
    inputs = prompt_inputs(policy, examples, recipe)
    lengths = {"max_new_tokens": SAMPLE_TOKENS, "min_new_tokens": SAMPLE_TOKENS}
    with ExitStack() as inside:
        forwards = inside.enter_context(watched_forwards(policy.model))
        inside.enter_context(generating(policy.model))
        inside.enter_context(torch.no_grad())
        if groups is not None:
            inner_model = inner_model_of(policy.model)
            inside.enter_context(prompts_read_once(inner_model, groups, [len(e.images) for e in examples]))
        output = policy.model.generate(
            **inputs,
            **generation_options(policy, recipe) | lengths,
            output_logits=True,
            return_dict_in_generate=True,
        )
    completion_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    logits_BTV = torch.stack(output.logits, dim=1).float() / recipe.grpo.temperature
    logps = torch.log_softmax(logits_BTV, dim=-1).gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)
    return as_batch(inputs, completion_ids, examples), logps, forwards


def sample_by_vllm(
    sampler: VllmSampler, policy: Policy, examples: Sequence[Example], recipe: Recipe, step: int | None, **changes: Any
) -> tuple[dict[str, Any], Sampled]:
    """A batch of one completion per example from the server, and what it said of them; see VllmSampler."""
    inputs = prompt_inputs(policy, examples, recipe)
    masks = inputs["attention_mask"].bool()
    prompt_ids = [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
    items = [{"prompt": e.messages(recipe.data), "images": [i.open() for i in e.images]} for e in examples]
    sampled = sampler(policy.model, step, items, prompt_ids, range(len(examples)), **changes)
    rows = [torch.tensor(ids) for ids in sampled.ids]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    inside = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    batch = as_batch(inputs, padded.to(policy.model.device), examples)
    return {**batch, "completion_mask": inside.long().to(policy.model.device)}, sampled


@contextmanager
def random_adapter(model: nn.Module, scale: float = 0.05) -> Iterator[None]:
    """Inside, the adapter changes what the model says, as a fresh one, whose B is zero, does not."""
    weights = {p: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    try:
        with torch.no_grad():
            for parameter in weights:
                parameter.normal_(0, scale)
        yield
    finally:
        with torch.no_grad():
            for parameter, own in weights.items():
                parameter.copy_(own)


def as_batch(inputs: dict[str, Tensor], completion_ids: Tensor, examples: Sequence[Example]) -> dict[str, Any]:
    """The shape in which TRL hands batches around, which scoring reads."""
    return {
        "prompt_ids": inputs["input_ids"],
        "prompt_mask": inputs["attention_mask"],
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "pixel_values": inputs.get("pixel_values"),
        "image_grid_thw": inputs.get("image_grid_thw"),
        "mm_token_type_ids": inputs.get("mm_token_type_ids"),
        "num_images": [len(e.images) for e in examples],
    }
