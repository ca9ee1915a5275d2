"""Adapters that change the tiny model without any training."""

from pathlib import Path

import torch

from apo_lora.policy.loading import load_policy
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import write_atomically


def stir(model, scale: float = 0.3, seed: int = 0) -> None:
    """Gives a fresh adapter (whose B is zero) values, so that it changes the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def stirred_run(folder: Path, overrides=(), scale: float = 0.3, seed: int = 0) -> RunDir:
    """A run of the tiny recipe as training leaves one, as far as eval and chat read it."""
    run = RunDir(folder)
    recipe = load_recipe(find_recipe("tiny_cpu"), overrides)
    policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=0)
    stir(policy.model, scale, seed)
    policy.model.save_pretrained(run.adapter)
    write_atomically(run.recipe, recipe.to_yaml())
    return run
