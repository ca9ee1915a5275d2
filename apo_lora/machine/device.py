"""Which engine and which number format suit this machine."""

import torch

from apo_lora.errors import ModelError


def choose_engine(requested: str, has_gpu: bool) -> str:
    """Unsloth where there is a GPU, transformers + PEFT where there is none. Raises ModelError for the impossible."""
    if requested == "auto":
        return "unsloth" if has_gpu else "transformers"
    if requested == "unsloth" and not has_gpu:
        raise ModelError(
            "model.engine: unsloth needs a CUDA GPU, and none is visible; use a machine with one, or model.engine=auto"
        )
    return requested


def choose_dtype(requested: str, has_gpu: bool, bf16_is_native: bool) -> torch.dtype:
    """bfloat16 where the GPU computes it natively, else float16 (T4, V100); float32 on a CPU."""
    if requested == "auto":
        return (torch.bfloat16 if bf16_is_native else torch.float16) if has_gpu else torch.float32
    if requested == "bfloat16" and has_gpu and not bf16_is_native:
        raise ModelError("model.dtype: this GPU does not support bfloat16 natively; use float16 or auto")
    if requested == "float16" and not has_gpu:
        raise ModelError("model.dtype: float16 needs a GPU; on a CPU use float32 or auto")
    return getattr(torch, requested)
