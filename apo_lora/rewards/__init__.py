"""What completions earn: finding, reading and comparing final answers; format; custom rewards. No torch."""

from apo_lora.rewards.scores import accuracy_reward, format_reward

__all__ = ["accuracy_reward", "format_reward"]
