"""Unsloth's real code on a host without a GPU. For tests only; it refuses to run where there is a GPU.

Unsloth patches torch, transformers and TRL for the whole process, so a test runs a script in a fresh interpreter:

    from unsloth_on_cpu import start
    start()                        # first of all: before torch, trl and apo_lora.trainer
    from apo_lora.trainer import APOTrainer

What a CPU cannot do stays untouched by this: Triton kernels, offloaded checkpointing (pinned memory), 8-bit Adam.
"""

import os
import sys
import types

ENVIRONMENT = {
    "UNSLOTH_ALLOW_CPU": "1",  # import without a GPU; it also leaves TRL alone, which start() makes up for
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def start() -> None:
    """Imports Unsloth, lets it rewrite TRL's trainers, and makes our engine "unsloth" acceptable without a GPU."""
    already = {"torch", "trl", "unsloth"} & sys.modules.keys()
    if already:
        raise RuntimeError(f"start() comes first, and {', '.join(sorted(already))} is imported already")
    os.environ.update(ENVIRONMENT)
    import torch

    if torch.cuda.is_available():
        raise RuntimeError("unsloth_on_cpu is for hosts without a GPU: here it would leave TRL's trainer as it is")
    torch.cuda.get_device_properties = lambda *device: types.SimpleNamespace(
        name="CPU", total_memory=8 << 30, major=8, minor=0, multi_processor_count=1
    )
    import unsloth
    import unsloth.models.loader
    from unsloth.models.rl import patch_trl_disable_gradient_checkpointing, patch_trl_rl_trainers

    patch_trl_disable_gradient_checkpointing()
    patch_trl_rl_trainers()
    unsloth.models.loader.ALLOW_BITSANDBYTES = True  # else it loads 16-bit weights, with only a printed line
