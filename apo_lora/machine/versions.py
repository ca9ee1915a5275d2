"""What a run ran on: versions and device. Never a token, a user name or an environment variable."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from apo_lora.machine import ranks

PACKAGES = (
    "apo-lora", "torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "bitsandbytes", "xformers",
    "datasets", "accelerate", "triton", "math-verify",
)  # fmt: skip


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(engine: str | None = None) -> dict[str, Any]:
    """`engine`: who computes, where a model is loaded."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed(name) for name in PACKAGES},
        "gpu": gpu,
        "engine": engine,
        "processes": ranks.num_processes(),
        "cpu_threads": torch.get_num_threads(),
    }
