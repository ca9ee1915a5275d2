"""One group scored and differentiated both ways before step 1: with a shared prompt, and with a prompt per completion.

The kernels, versions and Unsloth patches of this machine may be an untested combination, so sharing is compared with
the model's stock forward pass, and training continues without it where the two do not agree.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apo_lora.data.examples import Example
from apo_lora.policy.batches import Batch, pixels, row_slices
from apo_lora.policy.loading import Policy
from apo_lora.policy.scoring import token_logps
from apo_lora.policy.shared_prompt.attention import obstacle
from apo_lora.preflight.sample import short_sample
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.sampling import without_dropout

# Mean difference of log-probs in nats, and relative difference of LoRA gradients. In 16 bits the two ways round
# differently; attention to the wrong tokens makes the gradients differ by about as much as they are large.
LOGPS_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
GRADIENT_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}


def compare_shared_prompt(policy: Policy, batch: Batch) -> tuple[bool, str]:
    """(whether both ways agree, the figures or the reason), on the first prompt of a batch.

    Leaves weights and gradients as they were. Only running out of memory is raised.
    """
    if (reason := obstacle(policy.model)) is not None:
        return False, reason
    group = _one_group(batch)
    try:
        logps, gradient = _logps_and_gradient(policy, [group])
        unshared = [row | {"group": None} for row in row_slices(group, 1)]
        expected_logps, expected_gradient = _logps_and_gradient(policy, unshared)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any error of an untested kernel or library version is a reason not to use it
        return False, _in_one_line(error)
    nats = (logps - expected_logps)[group["completion_mask"].bool()].abs().mean().item()
    relative = ((gradient - expected_gradient).norm() / expected_gradient.norm()).item()
    same = nats <= LOGPS_LIMIT[policy.dtype] and relative <= GRADIENT_LIMIT[policy.dtype]  # and neither is NaN
    return same, f"log-probs differ by {nats:.1e} nats on average, LoRA gradients by {relative:.1e} relative"


def compare_shared_reading(policy: Policy, examples: Sequence[Example], recipe: Recipe) -> tuple[bool, str]:
    """The same of sampling, which reads a prompt once: two prompts, two completions each, scored without sharing."""
    repeated = [example for example in examples[:2] for _ in range(2)]
    groups = [place // 2 for place in range(len(repeated))]
    try:
        batch, sampled, _ = short_sample(policy, repeated, recipe, groups=groups)
        with torch.no_grad(), policy.autocast():
            scored, _ = token_logps(policy.model, batch, temperature=recipe.grpo.temperature)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return False, _in_one_line(error)
    nats = (scored - sampled).abs().mean().item()
    return nats <= LOGPS_LIMIT[policy.dtype], f"sampling with it differs by {nats:.1e} nats"


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _one_group(batch: Batch) -> dict[str, Any]:
    """The first prompt of the batch with everybody's completions behind it, the later ones cut shorter."""
    first, completion_ids = next(row_slices(batch, 1)), batch["completion_ids"]
    first["pixel_values"] = pixels(first)
    members, width = max(2, len(completion_ids)), completion_ids.shape[1]
    completion_ids = completion_ids.expand(members, -1)
    lengths = torch.linspace(width, 1, members, device=completion_ids.device).long()
    mask = (torch.arange(width, device=completion_ids.device) < lengths.unsqueeze(1)).long()
    group = {"completion_ids": completion_ids * mask, "completion_mask": mask, "group": torch.zeros_like(lengths)}
    for key in ("prompt_ids", "prompt_mask", "mm_token_type_ids"):
        group[key] = None if first.get(key) is None else first[key].expand(members, -1)
    for key in ("pixel_values", "image_grid_thw"):
        group[key] = None if first.get(key) is None else torch.cat([first[key]] * members)
    return group | {"num_images": first["num_images"] * members}


def _logps_and_gradient(policy: Policy, passes: list[dict]) -> tuple[Tensor, Tensor]:
    """(logps_BT, LoRA gradient of their sum as one vector), as training computes them but for dropout."""
    was_training, scored = policy.model.training, []
    try:
        policy.model.train()
        with without_dropout(policy.model):
            for rows in passes:
                with policy.autocast():
                    logps, _ = token_logps(policy.model, rows)
                logps.sum().backward()
                scored.append(logps.detach())
        gradients = [p.grad.float().flatten() for p in policy.model.parameters() if p.grad is not None]
        return torch.cat(scored), torch.cat(gradients)
    finally:
        policy.model.train(was_training)
        policy.model.zero_grad(set_to_none=True)
