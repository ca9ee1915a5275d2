"""A recipe as an APOConfig. Every value that matters is passed, and compared once the trainer has it: TRL's defaults
are not a recipe's, and Unsloth's trainer changes values on its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apo_lora.config import LOSS_TYPES, APOConfig
from apo_lora.errors import ModelError
from apo_lora.machine import ranks
from apo_lora.policy.loading import Policy
from apo_lora.recipe.schema import Recipe


def training_arguments(recipe: Recipe, policy: Policy, checkpoints: Path, max_steps: int) -> APOConfig:
    """`max_steps`: optimizer steps of the whole run. Raises ModelError for what this machine cannot do."""
    return APOConfig(**config_values(recipe, policy, checkpoints, max_steps))


def refuse_changes(config: Any, asked: Mapping[str, Any], *, by: type) -> None:
    """Raises ModelError where the class `by` has replaced an argument that a run depends on."""
    if changed := changed_values(config, asked):
        raise ModelError(
            f"model.engine: {by.__name__} changed the arguments it was given ({'; '.join(changed)}); "
            "install the versions in constraints.txt"
        )


def changed_values(config: Any, asked: Mapping[str, Any]) -> list[str]:
    """Arguments that a run depends on and that differ between `config` and `asked`, one line each."""
    return [
        f"{key} is {getattr(config, key)!r}, not {value!r}"
        for key, value in asked.items()
        if key in DEPENDED_ON and getattr(config, key) != value
    ]


DEPENDED_ON = {
    "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
    "num_iterations", "max_completion_length", "mask_truncated_completions", "temperature", "top_p", "top_k",
    "min_p", "repetition_penalty", "generation_kwargs", "use_vllm",
    "vllm_importance_sampling_correction", "beta", "use_bias_correction_kl", "epsilon", "epsilon_high", "loss_type",
    "importance_sampling_level", "scale_rewards", "reward_weights", "max_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "seed", "gradient_checkpointing", "use_cpu", "bf16", "fp16", "shuffle_dataset",
    "remove_unused_columns", "output_dir", "logging_steps", "save_strategy", "save_steps", "save_total_limit",
    "dads", "stcr", "stcr_amplify_positive", "correct_by", "correct_from", "entropy_coef", "shared_prompt",
    "zero_variance_groups", "reference", "importance_cap", "max_nonfinite_steps",
}  # fmt: skip
"""What a run's sampling, loss, optimisation or record depends on. The others may differ: Unsloth,
for example, sets the precision of an evaluation that no run performs (bf16_full_eval, fp16_full_eval)."""


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
        "use_vllm": False,  # TRL's own; rollout.engine=vllm is the trainer's sampler
        "zero_variance_groups": grpo.zero_variance_groups,
        # credit and loss
        "reward_weights": list(recipe.rewards.weights) if recipe.rewards.weights else None,
        "correct_by": recipe.rewards.correct_by,
        "correct_from": recipe.rewards.correct_from,
        "scale_rewards": grpo.scale_rewards,
        "dads": recipe.apo.dads,
        "stcr": recipe.apo.stcr,
        "stcr_amplify_positive": recipe.apo.stcr_amplify_positive,
        "entropy_coef": recipe.apo.entropy_coef,
        "beta": grpo.beta,
        "reference": grpo.reference,
        "epsilon": grpo.epsilon,
        "epsilon_high": grpo.epsilon_high,
        "importance_sampling_level": grpo.ratio,
        "loss_type": next(name for name, value in LOSS_TYPES.items() if value == grpo.normalization),
        "importance_cap": recipe.rollout.importance_cap,
        "shared_prompt": grpo.shared_prompt,
        # optimisation
        "max_steps": max_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler,
        "warmup_steps": train.warmup_steps,
        "optim": _optimizer(train.optimizer, on_gpu),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "max_nonfinite_steps": train.max_nonfinite_steps,
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
