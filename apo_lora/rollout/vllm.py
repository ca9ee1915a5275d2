"""Sampling with vLLM instead of the model's own generate(): opt-in, on the GPU that trains, through Unsloth.

Unsloth calls it fast_inference: vLLM and the trainer share one copy of the weights, and the adapter of the moment goes
along with every request. What is sampled is scored by the trainer's own model, as always; vLLM's kernels round
differently, and no importance weights correct for it. None of this has run on a GPU yet.
"""

from typing import Any

from apo_lora.machine.versions import VLLM, installed
from apo_lora.recipe.schema import Recipe

NEVER = -100.0
"""The lowest bias of a token that vLLM admits; next to it a token's probability is about 1e-44."""


def vllm_problem(recipe: Recipe, *, has_gpu: bool) -> str | None:
    """Why this machine cannot sample with vLLM as the recipe asks, or None. Imports nothing heavy."""
    if recipe.rollout.engine != "vllm":
        return None
    otherwise = "or rollout.engine=transformers, the default"
    if installed("vllm") is None:
        return f"rollout.engine: vllm is not installed; `pip install {VLLM}` (for the tested torch), {otherwise}"
    if not has_gpu:
        return f"rollout.engine: vllm needs a CUDA GPU, and none is visible; use a machine with one, {otherwise}"
    return None


def loading_options(recipe: Recipe) -> dict[str, Any]:
    """What Unsloth's from_pretrained takes on top, so that the model comes with a vLLM engine."""
    if recipe.rollout.engine != "vllm":
        return {}
    return {
        "fast_inference": True,
        "max_lora_rank": recipe.lora.r,
        "max_seq_length": _max_length(recipe),
        "gpu_memory_utilization": recipe.rollout.vllm_gpu_memory_utilization,
    }


def generation_values(recipe: Recipe, never_sampled: list[int]) -> dict[str, Any]:
    """APOConfig's keys on who samples. The trainer holds vision tokens back from generate(), and this from vLLM."""
    if recipe.rollout.engine != "vllm":
        return {"use_vllm": False}
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": recipe.rollout.vllm_gpu_memory_utilization,
        "vllm_max_model_length": _max_length(recipe),
        "generation_kwargs": {"logit_bias": dict.fromkeys(never_sampled, NEVER)},
    }


def _max_length(recipe: Recipe) -> int:
    return recipe.data.max_prompt_tokens + recipe.grpo.max_completion_length
