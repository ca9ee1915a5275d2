"""Which items of the data set a rollout takes, beside those that the data loader hands over."""

import random
from typing import Any

from transformers import TrainerState

from apo_lora.config import APOConfig
from apo_lora.machine import ranks

Items = list[dict[str, Any]]


def next_items(dataset: Any, config: APOConfig, state: TrainerState) -> Items:
    """This process's rows of the rollout after the one that begins now, as the data loader will give them: in the data
    set's own order, G to a prompt. None after the last.
    """
    steps = config.steps_per_generation * config.num_iterations // config.gradient_accumulation_steps
    if config.shuffle_dataset or state.global_step + steps >= state.max_steps:
        return []
    rollout, rows = state.global_step // steps + 1, config.per_device_train_batch_size * config.steps_per_generation
    first = (rollout * ranks.num_processes() + ranks.rank()) * rows
    return dataset.__getitems__([row // config.num_generations for row in range(first, first + rows)])


def other_items(dataset: Any, seed: int, state: TrainerState, number: int, round_number: int) -> Items:
    """Replacement prompts; the same ones where a run is continued."""
    rng = random.Random(f"{seed} {state.global_step} {round_number}")
    return [dataset[rng.randrange(len(dataset))] for _ in range(number)]
