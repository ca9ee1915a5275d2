"""What completions earn: final answers found, read and compared; the form they keep; rewards of one's own. No torch."""

from apo_lora.rewards.scores import accuracy_reward, format_reward

__all__ = ["accuracy_reward", "format_reward"]
