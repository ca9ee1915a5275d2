"""APOTrainer on the tiny model, for tests: conftest's `make_trainer` builds it, and these look at what it did."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from transformers import TrainerCallback

from apo_lora.recipe.schema import Recipe

SMALL = {
    "data": {"train": "boards", "limit": 16},
    "grpo": {
        "num_generations": 4, "prompts_per_step": 2, "completions_per_pass": 8, "max_completion_length": 40,
        "beta": 0.1,
    },
    "apo": {"dads": "complement_exp", "stcr": 1.05},
    "train": {"max_steps": 2, "learning_rate": 1e-2, "seed": 3},
}  # fmt: skip

LOSSES = {
    "released": {},
    "other": {"ratio": "sequence", "normalization": "sequences", "scale_rewards": "batch", "epsilon_high": 0.3},
    "constant": {"normalization": "constant", "scale_rewards": "none"},
}
"""Options of `grpo` that give another loss each; tests/test_apo.py tries them one by one."""


def recipe_of(**changes):
    tree = {section: dict(keys) for section, keys in SMALL.items()}
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return Recipe.model_validate(tree)


def from_an_older_policy(trainer):
    """As if other weights had sampled, the same for a completion wherever it is scored. Needs num_iterations=2."""
    score = trainer._score_frozen_policies

    def scored(batch):
        score(batch)
        ids = (batch["completion_ids"] * batch["completion_mask"]).float()
        batch["old_per_token_logps"] += 0.3 * torch.sin(ids) + 0.3 * torch.sin(ids.sum(dim=-1, keepdim=True))

    trainer._score_frozen_policies = scored
    return trainer


def adapter(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer):
    return [log for log in trainer.state.log_history if "reward" in log]


def largest_difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.gradient = torch.cat(gradients).clone()


@contextmanager
def processed_images(processor) -> Iterator[list[int]]:
    """How many images the processor's image processor computes pixels of, call by call."""
    kind, counts = type(processor.image_processor), []
    compute = kind._preprocess

    def counted(self, images, *arguments, **options):
        counts.append(len(images))
        return compute(self, images, *arguments, **options)

    with patch.object(kind, "_preprocess", counted):  # not the object's: checkpoints hold its attributes
        yield counts
