"""A recipe as TRL's GRPOConfig. Every value that matters is passed, and asserted after construction: TRL's defaults are
not ours, and Unsloth's config class changes values on its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apo_lora.errors import ModelError
from apo_lora.machine import ranks
from apo_lora.policy.loading import Policy, vision_token_ids
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.vllm import generation_values


def grpo_config(recipe: Recipe, policy: Policy, checkpoints: Path, max_steps: int) -> Any:
    """The trl.GRPOConfig of this moment (Unsloth replaces the class on a GPU)."""
    from trl import GRPOConfig

    values = config_values(recipe, policy, checkpoints, max_steps)
    config = GRPOConfig(**values)
    changed = changed_values(config, values)
    assert not changed, f"{type(config).__name__} changed on its own: {'; '.join(changed)}"
    return config


def changed_values(config: Any, values: Mapping[str, Any]) -> list[str]:
    """What `config` holds in place of `values`, one line each."""
    return [
        f"{key} is {getattr(config, key)!r}, not {value!r}"
        for key, value in values.items()
        if getattr(config, key) != value and key != "report_to"  # "none" is stored as []
    ]


def config_values(recipe: Recipe, policy: Policy, checkpoints: Path, max_steps: int) -> dict[str, Any]:
    grpo, train = recipe.grpo, recipe.train
    on_gpu = torch.cuda.is_available()
    # Of each process; combination_problems has seen that it is a whole number.
    passes_per_step = recipe.completions_per_step // ranks.num_processes() // grpo.completions_per_pass
    return {
        "output_dir": str(checkpoints),
        # rollout
        "num_generations": grpo.num_generations,
        "per_device_train_batch_size": grpo.completions_per_pass,
        "gradient_accumulation_steps": passes_per_step,
        "steps_per_generation": passes_per_step * (recipe.prompts_per_rollout // grpo.prompts_per_step),
        "num_iterations": grpo.num_iterations,
        "max_completion_length": grpo.max_completion_length,
        "mask_truncated_completions": grpo.mask_truncated_completions,
        "temperature": grpo.temperature,
        "top_p": grpo.top_p,
        "top_k": grpo.top_k,
        **generation_values(recipe, vision_token_ids(policy.processor)),
        # The loss is apo.apo_loss and the KL is ours. With beta 0 the trainer neither copies the fresh adapter as a
        # reference policy nor runs a reference pass of its own.
        "beta": 0.0,
        "use_bias_correction_kl": False,
        "epsilon": grpo.epsilon,
        "epsilon_high": grpo.epsilon,
        "loss_type": "grpo",
        "scale_rewards": "group",
        # optimisation
        "max_steps": max_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler,
        "warmup_steps": train.warmup_steps,
        "optim": _optimizer(train.optimizer, on_gpu),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
        "gradient_checkpointing": recipe.model.gradient_checkpointing,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and policy.dtype == torch.bfloat16,
        "fp16": on_gpu and policy.dtype == torch.float16,
        # bookkeeping: one log per step, checkpoints sealed and rotated by us
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": train.save_steps,
        "save_total_limit": None,
        "report_to": list(recipe.output.report_to) or "none",
        "disable_tqdm": True,
        "log_completions": False,
        "remove_unused_columns": False,
        "shuffle_dataset": False,  # data.training_order did
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": on_gpu,
    }


def _optimizer(requested: str, on_gpu: bool) -> str:
    if requested == "auto":
        return "adamw_8bit" if on_gpu else "adamw_torch"
    if requested == "adamw_8bit" and not on_gpu:
        raise ModelError("train.optimizer: adamw_8bit needs a GPU; on a CPU use adamw_torch or auto")
    return requested
