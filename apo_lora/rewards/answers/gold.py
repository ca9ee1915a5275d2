"""The gold answer made plain: its text, the choice or the letters that are right, the parts of a list."""

import re
from dataclasses import dataclass
from functools import lru_cache

from apo_lora.rewards.answers.letters import bare_letter, chosen, is_rivalled, labelled, several_letters
from apo_lora.rewards.answers.lists import solutions, written_apart
from apo_lora.rewards.answers.mathematics import math_equal
from apo_lora.rewards.answers.numbers import Number, parse_number
from apo_lora.rewards.answers.plain import plain
from apo_lora.rewards.answers.same import choice_text, same_as_choice
from apo_lora.rewards.answers.text import MAX_ANSWER_CHARS, after_answer_phrase, final_answer, last_box, without_phrase
from apo_lora.rewards.answers.units import strip_unit

_MAX_CHARS = 100_000  # a whole solution may come with it, after which "####" or a box gives the answer
_SIGN = re.compile(r"[<>=+*/-]|\\[a-z]+")


@dataclass(frozen=True)
class Gold:
    """What counts as right. `text` is the wording of the right choice, or of an open question's answer."""

    text: str
    index: int | None = None
    """The right choice, if there are choices and one is right."""
    choices: tuple[str, ...] = ()
    letters: frozenset[int] = frozenset()
    """The right letters: of the choices, or of an open question whose gold gives letters."""
    worded: bool = False
    """An open question's gold with a text after its letter: "C: 18"."""
    parts: tuple[str, ...] = ()
    """Of a list, two or more."""
    ordered: bool = False
    """The parts fill blanks: their order counts."""


@lru_cache(maxsize=4096)
def read_gold(answer: str, choices: tuple[str, ...]) -> Gold | None:
    """The gold answer made plain; None where no answer could ever be judged against it."""
    if len(answer) > _MAX_CHARS:
        return None
    raw = gold_itself(answer)
    text = plain(raw)
    if choices:
        indices = _right_choices(text, choices)
        if not indices:
            return None
        index = min(indices) if len(indices) == 1 else None
        wording = text if index is None else choice_text(choices[index], index)
        return Gold(wording, index, choices, indices) if _is_usable(wording) else None
    if after_answer_phrase(text):
        raw = without_phrase(raw)
        text = plain(raw)
    return _open_gold(raw, text) if _is_usable(text) else None


def gold_itself(answer: str) -> str:
    """The gold answer without the solution before it: behind </think> or "####", in <answer> or in a box."""
    if "</think>" in answer or "<answer>" in answer:
        found = final_answer(answer)
        answer = found.text if found else ""
    return last_box(answer) or answer.split("####")[-1]


def _is_usable(text: str) -> bool:
    has_content = re.search(r"\w", text) or _SIGN.fullmatch(text)
    return bool(has_content) and len(text) <= MAX_ANSWER_CHARS and text.count("{") == text.count("}")


def _open_gold(raw: str, text: str) -> Gold:
    if apart := written_apart(raw):
        parts = tuple(plain(part) for part in apart)
        return Gold(", ".join(parts), parts=parts, ordered=True)
    if re.fullmatch(r"\(?[A-Z]\)?", text):
        return Gold(text, letters=frozenset({bare_letter(text)}))
    if letters := several_letters(text):
        return Gold(text, letters=letters)
    label = labelled(text)
    if label and not label[2] and label[0] < 8 and text.lstrip("([")[0].isupper() and not is_rivalled(*label[:2], 26):
        return Gold(label[1], letters=frozenset({label[0]}), worded=True)
    parts = tuple(solutions(text))
    number = parse_number(text, gold=True)
    return Gold(text, parts=parts if len(parts) > 1 and (number is None or number.comma and ", " in text) else ())


def _right_choices(text: str, choices: tuple[str, ...]) -> frozenset[int]:
    if (choice := chosen(text, choices)) is not None:
        return frozenset({choice})
    found = same_as_choice(text, choices) or [
        i for i, choice in enumerate(choices) if math_equal(strip_unit(text), strip_unit(plain(choice)))
    ]
    if found:
        return frozenset(found[:1])
    several = several_letters(text)
    if several and max(several) < len(choices):
        return several
    label = labelled(text)
    if label and label[0] < len(choices):
        same = same_as_choice(label[1], choices)
        if label[0] in same or not same and not label[2]:
            return frozenset({label[0]})
    phrase = after_answer_phrase(text)
    return _right_choices(plain(phrase), choices) if phrase and plain(phrase) != text else frozenset()


def describes_number(text: str) -> Number | None:
    """The number that a plain gold text is, if it is one (for making wrong answers)."""
    return parse_number(plain(text), gold=True)
