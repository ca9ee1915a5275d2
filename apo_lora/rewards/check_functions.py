"""The check of every built-in reward that a recipe names, on the recipe's own rows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from apo_lora.recipe.schema import BUILT_IN_REWARDS, RewardsSection
from apo_lora.rewards.boxes import box_tries
from apo_lora.rewards.check import CheckRow, TriesOf, Try, accuracy_tries, check_rows, in_answer
from apo_lora.rewards.functions import RewardFunction, reward_functions
from apo_lora.rewards.relaxed import relaxed_tries
from apo_lora.rewards.shaping import overlong_tries, repetition_tries
from apo_lora.rewards.verifier import Verifier


def check_functions(
    rows: Sequence[tuple[str, Sequence[str] | None]], rewards: RewardsSection, verifier: Verifier, max_tokens: int
) -> list[CheckRow]:
    """The lines for each built-in function in `rewards.functions`; for `accuracy` where there is none.

    `rows` are (answer, choices). The user's own functions are neither loaded nor called.
    """
    names = tuple(name for name in rewards.functions if name in BUILT_IN_REWARDS) or ("accuracy",)
    functions = reward_functions(rewards.model_copy(update={"functions": names}), verifier, max_tokens)
    by_row: dict[str, TriesOf] = {
        "accuracy": accuracy_tries,
        "relaxed": lambda answer, choices: _in_tags(relaxed_tries(answer, choices, rewards.relaxed_tolerance)),
        "iou": lambda answer, choices: _in_tags(box_tries(answer)),
        "format": lambda answer, choices: [("tags", 0.5, in_answer(answer)), ("no tags", 0.0, answer)],
    }
    by_tokens = {
        "overlong": lambda: overlong_tries(max_tokens, rewards.overlong_cache(max_tokens)),
        "repetition": lambda: repetition_tries(rewards.repetition_ngram),
    }
    checks: list[CheckRow] = []
    for name, function in zip(names, functions, strict=True):
        if name in by_row:
            found = check_rows(rows, _as_score(function), by_row[name])
        else:
            found = [
                CheckRow(label, expected, 1, int(function(completion_ids=[ids])[0] == expected), None)
                for label, expected, ids in by_tokens[name]()
            ]
        prefix = "" if name == "accuracy" else f"{name}: "
        checks += [replace(row, format=prefix + row.format) for row in found]
    return checks


def _in_tags(tries: Iterator[Try]) -> Iterator[Try]:
    return ((label, expected, in_answer(text)) for label, expected, text in tries)


def _as_score(function: RewardFunction):
    return lambda completions, answers, choices: function(completions=completions, answer=answers, choices=choices)
