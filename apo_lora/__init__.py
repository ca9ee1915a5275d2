"""apo-lora: teach a vision-language model to reason on one GPU, with LoRA, GRPO and APO (arXiv 2506.21655).

For use in your own scripts; each name is imported on first use:

    APOTrainer, APOConfig            replace TRL's GRPOTrainer and GRPOConfig, stock or Unsloth's
    APOCallback                      a callback that also receives rollouts
    assign_credit, apo_loss          the algorithm as functions on tensors
    accuracy_reward, format_reward   the two built-in rewards of one completion
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "APOTrainer": "apo_lora.trainer",
    "APOConfig": "apo_lora.config",
    "APOCallback": "apo_lora.run.hooks",
    "assign_credit": "apo_lora.apo",
    "apo_loss": "apo_lora.apo",
    "accuracy_reward": "apo_lora.rewards.scores",
    "format_reward": "apo_lora.rewards.scores",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
