"""Checks before training that the rewards work on the user's rows: gold scores 1 in every format, wrong answers 0.

`apo-lora check-rewards` shows their table.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from apo_lora.recipe.schema import BUILT_IN_REWARDS, RewardsSection
from apo_lora.rewards.answers.gold import Gold, describes_number, gold_itself, read_gold
from apo_lora.rewards.answers.match import MathQuestion, judge
from apo_lora.rewards.answers.text import FinalAnswer, after_answer_phrase, without_phrase
from apo_lora.rewards.boxes import box_tries
from apo_lora.rewards.functions import RewardFunction, reward_functions
from apo_lora.rewards.relaxed import relaxed_tries
from apo_lora.rewards.shaping import overlong_tries, repetition_tries
from apo_lora.rewards.verifier import Verifier

Score = Callable[[Sequence[str], Sequence[str], Sequence[Sequence[str] | None]], list[float]]
Try = tuple[str, float, str]
"""What it is, its right reward, the completion."""
TriesOf = Callable[[str, Sequence[str] | None], Iterable[Try]]

_THINK = "<think>I look at the image and reason.</think>"
_WORDS = ("banana", "none of these", "seventeen purple elephants")


@dataclass(frozen=True)
class CheckRow:
    """A line of the table: a format of answers, its right reward, how many rows got it, and the first that did not."""

    format: str
    expected: float
    checked: int
    passed: int
    first_failure: int | None


def in_answer(text: str) -> str:
    """A completion in the required format whose final answer is `text`."""
    return f"{_THINK}<answer>{text}</answer>"


def _formats(answer: str, choices: Sequence[str] | None) -> list[tuple[str, str]]:
    value = gold_itself(answer)
    if after_answer_phrase(value) and value not in (choices or ()):
        value = without_phrase(value).strip("* .")
    formats = [
        ("unchanged", in_answer(value)),
        ("spaces and full stop", in_answer(f" {value}. ")),
        ("\\boxed{}, no tags", f"The answer is \\boxed{{{value}}}."),
        ("\\boxed{} in tags", in_answer(f"\\boxed{{{value}}}")),
        ('"The answer is"', in_answer(f"The answer is {value}.")),
        ("bold", in_answer(f"**{value}**")),
    ]
    gold = read_gold(answer, tuple(choices or ()))
    if gold is not None and gold.index is not None:
        letter, text = chr(65 + gold.index), choices[gold.index]
        formats += [
            ("letter", in_answer(letter)),
            ("(letter)", in_answer(f"({letter})")),
            ("boxed letter", f"The answer is $\\boxed{{\\text{{{letter}}}}}$."),
            ("letter and text", in_answer(f"{letter}) {text}")),
            ("Option letter", in_answer(f"Option {letter}")),
        ]
        if _is_unique(gold):
            formats.append(("the choice's text", in_answer(text)))
    elif gold is not None and (number := describes_number(answer)) is not None and number.integer:
        formats.append(("number with .0", in_answer(f"{value}.0" if value.isdecimal() else value)))
    return formats


def _is_unique(gold: Gold) -> bool:
    """Whether the text identifies the choice: not where the choices are themselves letters (images, for instance)."""
    return judge(FinalAnswer(gold.choices[gold.index], sentence=False), gold) is True


def wrong_answer(answer: str, choices: Sequence[str] | None = None) -> str:
    """A completion in the required format whose answer is wrong, but close to the gold answer; must earn 0."""
    gold = read_gold(answer, tuple(choices or ()))
    return in_answer(next((text for text in _wrong_texts(answer, choices, gold) if _is_wrong(text, gold)), "..."))


def _wrong_texts(answer: str, choices: Sequence[str] | None, gold: Gold | None) -> list[str]:
    if gold is None:
        return []
    if gold.index is not None:
        return [chr(65 + (gold.index + step) % len(choices)) for step in range(1, len(choices))]
    number = describes_number(answer)
    near = [] if number is None else [str(number.value + 1), str(number.value * 10 + 7)]
    return [*near, *(["B", "A"] if gold.letters else []), f"{gold.text} + 1", *_WORDS]


def _is_wrong(text: str, gold: Gold | None) -> bool:
    if gold is None:
        return True
    verdict = judge(FinalAnswer(text, sentence=False), gold)
    # A text that only mathematics can tell from the gold was made by adding 1: it is wrong.
    return isinstance(verdict, MathQuestion) or not verdict


def accuracy_tries(answer: str, choices: Sequence[str] | None) -> Iterator[Try]:
    """The gold in every format (must earn 1), a wrong answer and an empty one (must earn 0)."""
    for format, completion in _formats(answer, choices):
        yield format, 1.0, completion
    yield "a wrong answer", 0.0, wrong_answer(answer, choices)
    yield "an empty answer", 0.0, in_answer("")
    yield "an empty completion", 0.0, ""


def check_rows(
    rows: Sequence[tuple[str, Sequence[str] | None]], score: Score, tries_of: TriesOf = accuracy_tries
) -> list[CheckRow]:
    """Scores the tries of every row (answer, choices), and compares the rewards with the right ones.

    `score(completions, answers, choices)` is `Verifier.score` or anything like it. Rows count from 0.
    """
    tries: dict[tuple[str, float], list[tuple[int, str]]] = {}
    for index, (answer, choices) in enumerate(rows):
        for format, expected, completion in tries_of(answer, choices):
            tries.setdefault((format, expected), []).append((index, completion))
    table = [_check(format, expected, found, rows, score) for (format, expected), found in tries.items()]
    return sorted(table, key=lambda row: -row.expected)


def _check(format: str, expected: float, tries: list[tuple[int, str]], rows, score: Score) -> CheckRow:
    got = score([completion for _, completion in tries], [rows[i][0] for i, _ in tries], [rows[i][1] for i, _ in tries])
    failed = [index for (index, _), reward in zip(tries, got, strict=True) if reward != expected]
    return CheckRow(format, expected, len(tries), len(tries) - len(failed), failed[0] if failed else None)


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


def table(checks: Sequence[CheckRow]) -> list[str]:
    """The checks as lines for a terminal."""
    width = max([len("format"), *(len(check.format) for check in checks)])
    lines = [f"{'format':{width}}  must earn  checked  passed"]
    for check in checks:
        failure = "" if check.first_failure is None else f"   first failure: row {check.first_failure}"
        lines.append(f"{check.format:{width}}  {check.expected:9g}  {check.checked:7}  {check.passed:6}{failure}")
    return lines
