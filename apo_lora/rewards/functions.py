"""The recipe's rewards as functions that TRL calls: f(prompts, completions, **columns) -> one float a completion."""

from collections.abc import Callable, Sequence
from typing import Any

from apo_lora.recipe.schema import RewardsSection
from apo_lora.rewards.scores import format_reward
from apo_lora.rewards.verifier import Verifier

RewardFunction = Callable[..., list[float]]


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """Stock TRL hands over message lists, Unsloth's trainer strings."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def reward_functions(rewards: RewardsSection, verifier: Verifier) -> list[RewardFunction]:
    """One function per name in `rewards.functions`, in order; own ones are loaded. Raises RewardError."""

    def accuracy(completions: list, answer: list[str], choices: list, **columns: Any) -> list[float]:
        return verifier.score([completion_text(c) for c in completions], answer, choices)

    def format_(completions: list, **columns: Any) -> list[float]:
        return [format_reward(completion_text(c)) for c in completions]

    built_in = {"accuracy": accuracy, "format": format_}
    functions = []
    for name in rewards.functions:
        function = built_in.get(name) or _with_message_lists(_load(name))
        function.__name__ = name  # TRL names its reward columns after the function
        functions.append(function)
    return functions


def _load(spec: str) -> RewardFunction:
    from apo_lora.rewards.plugins import load_reward

    return load_reward(spec)


def _with_message_lists(function: RewardFunction) -> RewardFunction:
    """Own rewards always see what TRL documents for conversations: one list of messages per completion."""

    def own_reward(completions: list, **columns: Any) -> list[float]:
        messages = [[{"role": "assistant", "content": completion_text(c)}] for c in completions]
        return function(completions=messages, **columns)

    return own_reward
