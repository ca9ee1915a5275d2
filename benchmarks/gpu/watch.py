"""Training through `apo_lora.train.train`, with a look at the trainer that it builds."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

import apo_lora.policy.loading
from apo_lora.errors import ModelError
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir
from apo_lora.train import train
from apo_lora.trainer import APOTrainer
from benchmarks.gpu.record import Record


@contextmanager
def watched_training(
    look: Callable[[APOTrainer], None], after_loading: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Inside, `after_loading()` is called when the policy is loaded, before preflight, and `look(trainer)` when its
    trainer is built, before it trains."""
    original_load, original_build = apo_lora.policy.loading.load_policy, APOTrainer.__init__

    def load(*arguments: Any, **options: Any) -> apo_lora.policy.loading.Policy:
        policy = original_load(*arguments, **options)
        after_loading()
        return policy

    def build(trainer: APOTrainer, *arguments: Any, **named: Any) -> None:
        original_build(trainer, *arguments, **named)
        look(trainer)

    # train() looks load_policy up when it is called.
    with patch.object(apo_lora.policy.loading, "load_policy", load), patch.object(APOTrainer, "__init__", build):
        yield


def train_in_any_case(record: Record, recipe: Recipe, run: str) -> RunDir:
    """A preflight that refuses is a finding; what comes of the training without it is another."""
    try:
        return train(recipe, recipe_name=run)
    except ModelError as error:
        message = str(error)
    record.check("preflight lets the training begin", lambda: (False, message))
    gc.collect()  # the refused policy, whose modules refer to each other
    torch.cuda.empty_cache()
    without = recipe.model_copy(update={"train": recipe.train.model_copy(update={"preflight": False})})
    return train(without, recipe_name=run)


def is_rewritten(trainer: Any) -> bool:
    """Is its class one that Unsloth wrote? By the class's name: Unsloth also hides its own under TRL's."""
    return any(cls.__name__.startswith(("Unsloth", "_Unsloth")) for cls in type(trainer).__mro__)


def bases(trainer: Any) -> list[str]:
    return [f"{cls.__module__}.{cls.__name__}" for cls in type(trainer).__mro__[:3]]
