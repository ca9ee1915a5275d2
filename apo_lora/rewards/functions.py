"""The recipe's rewards as functions that TRL calls: f(prompts, completions, **columns) -> one float a completion."""

from collections.abc import Callable, Sequence
from typing import Any

from apo_lora.recipe.schema import GrpoSection, RewardsSection
from apo_lora.rewards.answers.same import Rules
from apo_lora.rewards.boxes import iou_reward
from apo_lora.rewards.relaxed import nearly_equal
from apo_lora.rewards.scores import accepted, format_reward
from apo_lora.rewards.shaping import overlong_punishment, repetition_penalty
from apo_lora.rewards.verifier import Verifier

RewardFunction = Callable[..., list[float]]


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """Stock TRL hands over message lists, Unsloth's trainer strings."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def verifier_of(rewards: RewardsSection) -> Verifier:
    """The verifier that a recipe asks for; to be closed, or used in a `with`."""
    rules = Rules(accept_unevaluated=rewards.accept_unevaluated, convert_units=rewards.convert_units)
    return Verifier(seconds_per_item=rewards.seconds_per_item, rules=rules)


def reward_functions(
    rewards: RewardsSection, verifier: Verifier, max_tokens: int = GrpoSection().max_completion_length
) -> list[RewardFunction]:
    """One function per name in `rewards.functions`, in order; own ones are loaded. Raises RewardError.

    `max_tokens` is the longest that a completion may be: what `overlong` punishes.
    """

    def accuracy(completions: list, answer: list[str], choices: list, **columns: Any) -> list[float]:
        return verifier.score([completion_text(c) for c in completions], answer, choices)

    def format_(completions: list, **columns: Any) -> list[float]:
        return [format_reward(completion_text(c)) for c in completions]

    def relaxed(completions: list, answer: list[str], choices: list, **columns: Any) -> list[float]:
        exact = accuracy(completions, answer, choices)
        rows = zip(exact, map(completion_text, completions), answer, choices, strict=True)
        return [
            right
            or float(not options and any(nearly_equal(text, g, rewards.relaxed_tolerance) for g in accepted(gold)))
            for right, text, gold, options in rows
        ]

    def iou(completions: list, answer: list[str], **columns: Any) -> list[float]:
        texts = map(completion_text, completions)
        rows = zip(texts, answer, strict=True)
        return [max(iou_reward(text, one, rewards.boxes) for one in accepted(gold)) for text, gold in rows]

    def overlong(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        cache = rewards.overlong_cache(max_tokens)
        return [overlong_punishment(len(ids), max_tokens, cache) for ids in completion_ids]

    def repetition(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [repetition_penalty(ids, rewards.repetition_ngram) for ids in completion_ids]

    built_in = {
        "accuracy": accuracy,
        "relaxed": relaxed,
        "iou": iou,
        "format": format_,
        "overlong": overlong,
        "repetition": repetition,
    }
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
