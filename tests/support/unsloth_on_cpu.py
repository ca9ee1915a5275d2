"""Unsloth's real code on a host without a GPU. For tests only; it refuses to run where there is a GPU.

Unsloth patches torch, transformers and TRL for the whole process, so a test runs a script in a process of its own with
`run_script`, and the script begins with

    from unsloth_on_cpu import load_tiny, start
    start()                                      # before transformers, trl and apo_lora.trainer are imported
    policy = load_tiny(model={"load_in_4bit": True})

What stays untried on a CPU: the Triton kernels, xformers, torch.compile, checkpointing offloaded to pinned memory,
8-bit Adam, float16, autocast.
"""

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import forks

PROJECT = Path(__file__).parents[2]

_started = False

ENVIRONMENT = {
    "UNSLOTH_ALLOW_CPU": "1",  # import without a GPU; it also leaves TRL alone, which start() makes up for
    "UNSLOTH_DISABLE_STATISTICS": "1",  # no call home
    "TORCHDYNAMO_DISABLE": "1",  # compiling would take minutes, and another compiler than a GPU's
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def run_script(script: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs it with `folder` as working directory, in a fork of a process that has called `start`."""
    environment = {**os.environ, **forks.environment("unsloth")}
    return forks.run([script, *arguments], kind="unsloth", cwd=folder, env=environment)


def start() -> None:
    """Imports Unsloth, lets it rewrite TRL's trainers, and makes our engine "unsloth" acceptable without a GPU.

    Does nothing where that is done already: in a fork.
    """
    global _started
    if _started:
        return
    import torch

    if torch.cuda.is_available():
        raise RuntimeError("unsloth_on_cpu is for hosts without a GPU: on one, it would leave TRL's trainer as it is")
    if too_early := {"transformers", "trl", "unsloth"} & sys.modules.keys():
        raise RuntimeError(f"start() comes first, and {', '.join(sorted(too_early))} is imported already")
    if missing := {key for key, value in ENVIRONMENT.items() if os.environ.get(key) != value}:
        raise RuntimeError(f"use run_script: {', '.join(sorted(missing))} must be set when the interpreter starts")
    torch.cuda.get_device_properties = lambda *device: types.SimpleNamespace(
        name="CPU", total_memory=8 << 30, major=8, minor=0, multi_processor_count=1
    )
    import unsloth
    import unsloth.models.loader
    from unsloth.models.rl import patch_trl_disable_gradient_checkpointing, patch_trl_rl_trainers

    patch_trl_disable_gradient_checkpointing()
    patch_trl_rl_trainers()
    unsloth.models.loader.ALLOW_BITSANDBYTES = True  # else it loads 16-bit weights, with only a printed line
    for name in ("from_pretrained", "get_peft_model"):
        _without_offload(unsloth.FastVisionModel, name)

    import apo_lora.policy.loading

    apo_lora.policy.loading.choose_engine = lambda requested, has_gpu: "unsloth"
    _started = True


def _without_offload(cls: type, name: str) -> None:
    """Checkpointing "unsloth" keeps activations in pinned memory, which needs a GPU; True is the same without that."""
    original = getattr(cls, name)

    def call(*arguments: Any, use_gradient_checkpointing: bool | str, **options: Any) -> Any:
        return original(*arguments, use_gradient_checkpointing=bool(use_gradient_checkpointing), **options)

    setattr(cls, name, staticmethod(call))


def load_tiny(model: dict | None = None, lora: dict | None = None) -> Any:
    """The embedded tiny policy, through our load_policy and Unsloth."""
    from apo_lora.machine.compat import fix_4bit_on_cpu
    from apo_lora.policy.loading import load_policy
    from apo_lora.recipe.schema import DataSection, LoraSection, ModelSection

    policy = load_policy(
        ModelSection(**{"name": "tiny", "engine": "unsloth", **(model or {})}),
        LoraSection(**(lora or {})),
        DataSection(train="boards"),
        seed=0,
    )
    fix_4bit_on_cpu(policy.model)
    return policy
