"""The recipe's rewards as functions that TRL calls: f(prompts, completions, **columns) -> one number per completion."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from apo_lora.errors import RewardError
from apo_lora.recipe.schema import BUILT_IN_REWARDS, GrpoSection, RewardsSection
from apo_lora.rewards.answers.same import Rules
from apo_lora.rewards.boxes import boxes_in, iou_reward
from apo_lora.rewards.calls import CheckedRewards, RewardFunction, awaited
from apo_lora.rewards.plugins import load_reward
from apo_lora.rewards.relaxed import nearly_equal
from apo_lora.rewards.scores import accepted, format_reward
from apo_lora.rewards.shaping import overlong_punishment, repetition_penalty
from apo_lora.rewards.verifier import Verifier

Answer = str | Sequence[str]
"""Gold: one text, or several that are each right."""

Scorer = Callable[[list[str], list[Answer], list[list[str] | None]], list[float]]
"""(completions, gold answers, choices) -> 1.0 where right; Verifier.score is one."""


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
        texts = [completion_text(c) for c in completions]
        return _relaxed(verifier.score(texts, answer, choices), texts, answer, choices, rewards.relaxed_tolerance)

    def iou(completions: list, answer: list[str], **columns: Any) -> list[float]:
        return _iou(map(completion_text, completions), answer, rewards.boxes)

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
        function = built_in.get(name) or _with_own_copies(load_reward(name))
        function.__name__ = name  # TRL names its reward columns after the function
        functions.append(function)
    return functions


def _relaxed(
    exact: list[float], texts: Iterable[str], answers: list[Answer], choices: list, tolerance: float
) -> list[float]:
    """`exact`: the rewards of `accuracy`."""
    return [
        right or float(not options and any(nearly_equal(text, one, tolerance) for one in accepted(answer)))
        for right, text, answer, options in zip(exact, texts, answers, choices, strict=True)
    ]


def _iou(texts: Iterable[str], answers: list[Answer], unit: str) -> list[float]:
    rows = zip(texts, answers, strict=True)
    return [max(iou_reward(text, one, unit) for one in accepted(answer)) for text, answer in rows]


def are_correct(
    texts: list[str], answers: list[Answer], choices: list[list[str] | None], rewards: RewardsSection, score: Scorer
) -> list[bool]:
    """What `rewards.correct_by` says of completions to held-out items, where `score` is the verifier's.

    `accuracy` says it in place of rewards that need more than the answer (the user's own, format, overlong,
    repetition), and in place of `iou` for answers without a box: other sets may have such.
    """
    if rewards.correct_by != "iou":
        exact = score(texts, answers, choices)
        if rewards.correct_by == "relaxed":
            exact = _relaxed(exact, texts, answers, choices, rewards.relaxed_tolerance)
        return [reward == 1 for reward in exact]
    correct = [overlap >= rewards.correct_from for overlap in _iou(texts, answers, rewards.boxes)]
    others = [i for i, gold in enumerate(answers) if not any(boxes_in(one, rewards.boxes) for one in accepted(gold))]
    exact = score(*([column[i] for i in others] for column in (texts, answers, choices)))
    for i, reward in zip(others, exact, strict=True):
        correct[i] = reward == 1
    return correct


def _with_own_copies(function: RewardFunction) -> RewardFunction:
    """Own rewards see what TRL documents for conversations, one list of messages per completion, and their own copies
    of the columns: what they change there changes nothing for the others, nor for the next step."""

    def own_reward(completions: list, **columns: Any) -> Any:
        messages = [[{"role": "assistant", "content": completion_text(c)}] for c in completions]
        return awaited(function(completions=messages, **_copied(columns, {})))

    with suppress(TypeError, ValueError):  # a builtin has none
        own_reward.__signature__ = inspect.signature(function)
    return own_reward


def _copied(value: Any, images: dict[int, Image.Image]) -> Any:
    """Of what rows are made of; what TRL adds is shared. `images`: copies so far, one for a prompt's completions."""
    if isinstance(value, dict):
        return {key: _copied(item, images) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, images) for item in value]
    if isinstance(value, Image.Image):
        if id(value) not in images:
            images[id(value)] = value.copy()
        return images[id(value)]
    return value


def probe(functions: Sequence[RewardFunction], item: dict[str, Any], num_generations: int) -> None:
    """Calls each of the user's own functions once, as for one group of completions, before a model is loaded for it.

    `item`: of the data set that is trained on (data/items.py). Raises RewardError.
    """
    from transformers import TrainerState

    texts = [f"<think>I look at the image.</think><answer>{accepted(item['answer'])[0]}</answer>", "I do not know."]
    prompt, columns = item["prompt"], {key: value for key, value in item.items() if key != "prompt"}
    arguments = {
        "prompts": [prompt] * num_generations,
        "completions": [[{"role": "assistant", "content": texts[place % 2]}] for place in range(num_generations)],
        "completion_ids": [[0] * 8 for _ in range(num_generations)],
        **{key: [value] * num_generations for key, value in columns.items()},
        "trainer_state": TrainerState(),
        "log_extra": lambda *column: None,
        "log_metric": lambda *figure: None,
    }
    for function in functions:
        if function.__name__ in BUILT_IN_REWARDS:
            continue
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            raise RewardError(
                f"reward {function.__name__!r} cannot be called: {error}; the columns are {', '.join(arguments)}"
            ) from None
        CheckedRewards(warn=str).of(function)(**arguments)  # training warns
