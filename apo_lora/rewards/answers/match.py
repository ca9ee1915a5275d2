"""Cheap comparison of an answer with the gold answer: same text, letter, yes/no, number, list. No sympy.

`judge` answers True or False where the texts decide it, and hands back a `MathQuestion` where only mathematics can.
"""

import re
from dataclasses import dataclass

from apo_lora.rewards.answers.denials import HEDGED
from apo_lora.rewards.answers.gold import Gold
from apo_lora.rewards.answers.letters import (
    bare_letter,
    chosen,
    equated,
    explicit_letter,
    is_rivalled,
    labelled,
    several_letters,
)
from apo_lora.rewards.answers.lists import (
    as_interval,
    as_matrix,
    same_name,
    solutions,
    split_list,
    unname,
    written_apart,
)
from apo_lora.rewards.answers.mathematics import degrees_to_radians, is_safe_math
from apo_lora.rewards.answers.numbers import parse_number, read_base
from apo_lora.rewards.answers.plain import compact, plain
from apo_lora.rewards.answers.readings import readings, right_side
from apo_lora.rewards.answers.same import STRICT, Rules, choice_text, same_as_choice, same_text, same_value, yes_no
from apo_lora.rewards.answers.text import FinalAnswer, without_phrase
from apo_lora.rewards.answers.units import strip_unit


@dataclass(frozen=True)
class MathQuestion:
    """Are these two safe plain texts mathematically equal? Bare lists in any order, tuples in theirs."""

    answer: str
    gold: str


def judge(answer: FinalAnswer, gold: Gold, rules: Rules = STRICT) -> bool | MathQuestion:
    """The verdict on a final answer, or the one question that mathematics must decide."""
    if answer.opening and (said := yes_no(answer.opening)) and gold.text.casefold() in ("yes", "no", "true", "false"):
        return said == yes_no(gold.text)
    if gold.choices:
        return _judge_choice(answer, gold, rules)
    for reading, is_value in readings(answer):
        if is_value and unname(gold.text)[0] and "=" in gold.text:
            continue  # "y = 5" is not "x = 5"
        verdict = _judge_open(reading, gold, rules)
        if verdict is not None:
            return verdict
    if gold.parts and (apart := written_apart(without_phrase(answer.text))):
        return _judge_parts([plain(part) for part in apart], gold, rules) or False
    if gold.letters and (explicit := explicit_letter(plain(answer.text))):
        return gold.letters == {explicit[0]}
    return _math_question(answer, gold, rules)


# --- open questions --------------------------------------------------------------------------------------------------


_PROSE = re.compile(r"[a-z]{2,} (?:[a-z]{2,}|\S)")


def _judge_open(text: str, gold: Gold, rules: Rules) -> bool | MathQuestion | None:
    if same_text(text, gold.text):
        return True
    if gold.letters:
        verdict = _judge_letters(text, gold, rules)
        if verdict is not None or not gold.worded:
            return verdict
    if gold.parts and not _is_hedge_between_words(text, gold):
        verdict = _judge_parts(solutions(text), gold, rules)
        if verdict or verdict is False and not _PROSE.search(text):
            return verdict  # "The answer is 1, 2" has a looser reading
    if HEDGED.search(text) and not HEDGED.search(gold.text):
        return None
    return same_value(text, gold.text, rules)


def _is_hedge_between_words(text: str, gold: Gold) -> bool:
    """ "x = 2 or x = 3" gives both solutions; "cat or dog" leaves it open."""
    in_words = any(re.search(r"(?<!\\)\b[a-z]{3,}", part, re.IGNORECASE) for part in gold.parts)
    return in_words and bool(HEDGED.search(text)) and not HEDGED.search(gold.text)


def _judge_letters(text: str, gold: Gold, rules: Rules) -> bool | None:
    """Against "C", "A, C" or "C: 18", where what is said after the letter must not contradict."""
    if several := several_letters(text):
        return several == gold.letters
    if (letter := bare_letter(text)) is not None:
        return gold.letters == {letter}
    label = labelled(text)
    if label is None or label[2] and not gold.worded:
        return None
    index, rest, weak = label
    if gold.worded:
        same = same_text(rest, gold.text) or same_value(rest, gold.text, rules)
        if weak and not same:
            return None
        return gold.letters == {index} and same is not False and not is_rivalled(index, rest, 5)
    return gold.letters == {index} and not is_rivalled(index, rest, 5)


def _judge_parts(parts: list[str], gold: Gold, rules: Rules) -> bool | MathQuestion | None:
    """A list against a list: in order where the gold gives one answer for each blank, else in any.

    A solution said twice is said once, unless the gold itself repeats one.
    """
    if not gold.ordered and len(set(gold.parts)) == len(gold.parts):
        parts = list({compact(part): part for part in parts}.values())
    if len(parts) != len(gold.parts):
        return None
    if gold.ordered:
        verdicts = [_same_part(part, wanted, rules) for part, wanted in zip(parts, gold.parts, strict=True)]
        if all(verdicts) or False in verdicts:
            return all(verdicts)
        return _ask(f"({', '.join(parts)})", f"({', '.join(gold.parts)})", rules) or False
    left = list(gold.parts)
    open_parts = []
    for part in parts:
        found = next((wanted for wanted in left if _same_part(part, wanted, rules)), None)
        if found is None:
            open_parts.append(part)
        else:
            left.remove(found)
    if not left:
        return True
    if any(all(_same_part(part, wanted, rules) is False for wanted in left) for part in open_parts):
        return False
    return _ask(", ".join(open_parts), ", ".join(left), rules) or False


def _same_part(part: str, wanted: str, rules: Rules) -> bool | None:
    if same_text(part, wanted):
        return True
    verdict = same_value(part, wanted, rules)
    can_ask = is_safe_math(strip_unit(part)) and is_safe_math(strip_unit(wanted))
    return False if verdict is None and (not can_ask or _is_undone_sum(part, wanted, rules)) else verdict


# --- choices ---------------------------------------------------------------------------------------------------------


Named = frozenset[int]  # choices of one wording, any of which may be meant; empty where it cannot be one of them


def _judge_choice(answer: FinalAnswer, gold: Gold, rules: Rules) -> bool | MathQuestion:
    """Right if all that the answer names is the right choice (or choices), in letters or in words."""
    named: set[Named] = set()
    for reading, is_value in readings(answer):
        named |= _named(reading, gold.choices, is_value)
    text = plain(answer.text)
    if named and (value := right_side(text)):
        named |= _in_words(value, gold.choices)  # "A, as 2 + 3 = 5"
    if not named and (explicit := explicit_letter(text)) and explicit[0] < len(gold.choices):
        named = {Named({explicit[0]})} | _in_words(explicit[1], gold.choices)
    if named:
        return all(choice & gold.letters for choice in named) and gold.letters <= Named().union(*named)
    return _math_question(answer, gold, rules)


def _in_words(text: str, choices: tuple[str, ...]) -> set[Named]:
    """What the words or the number of `text` name: nothing, one choice (or several of its wording), or too many."""
    found = same_as_choice(text, choices)
    wordings = [choice_text(choices[index], index) for index in found]
    return (
        {Named(found) if all(same_text(wording, wordings[0]) for wording in wordings) else Named()} if found else set()
    )


def _named(text: str, choices: tuple[str, ...], is_value: bool) -> set[Named]:
    """The choices that one reading names."""
    in_words = _in_words(text, choices)
    if is_value:
        return in_words
    if (choice := chosen(text, choices)) is not None:
        return {Named({choice})}
    # "C = 5" where 5 is B: whether label or variable is meant, the two contradict.
    if (said := equated(text)) and said[0] < len(choices) and (value := _in_words(said[1], choices)):
        return value | {Named({said[0]})}
    behind = re.fullmatch(r"(\S.*?)\s*(?:\(([A-Z])\)|\s([A-F]))", text)
    is_choice = any(same_text(text, plain(choice)) for choice in choices)
    if behind and not is_choice and (value := _in_words(behind.group(1), choices)):
        return value | {Named({ord(behind.group(2) or behind.group(3)) - 65})}  # "3 (B)"
    if in_words:
        return in_words
    label = labelled(text)
    after_label = same_as_choice(label[1], choices) if label and label[0] < len(choices) else []
    if label and label[0] in after_label:
        return {Named({label[0]})}
    several = several_letters(text)
    if several and max(several) < len(choices):
        return {Named({letter}) for letter in several}
    parts = split_list(text)
    if len(parts) > 1 and not HEDGED.search(text) and all(found := [_in_words(part, choices) for part in parts]):
        return set().union(*found)
    if len(parts) > 1 and len(letters := {bare_letter(part) for part in parts}) > 1 and None not in letters:
        return {Named()}  # "A or B"
    if label is None or label[2] or label[0] >= len(choices):
        return set()
    return {Named() if after_label or is_rivalled(*label[:2], len(choices)) else Named({label[0]})}


# --- mathematics -----------------------------------------------------------------------------------------------------

# Sums, products and quotients of numbers: arithmetic that is still to be done. A fraction or a power is a number.
_ARITHMETIC = re.compile(r"(?:[\d\s.,+*/(){}^!-]|\\(?:times|cdot|div|frac|sqrt)(?![a-z]))+")
_OPERATOR = re.compile(r"(?<=[\d)}!])\s*(?:[-+*/]|\\times|\\cdot|\\div)")


def _is_undone_sum(text: str, gold_text: str, rules: Rules) -> bool:
    """Whether `text` leaves arithmetic undone, as "10 + 2" for 12 does. Not "1/2", "10^3" or "3 \\times 10^8"."""
    wanted = parse_number(gold_text, gold=True)
    if rules.accept_unevaluated or wanted is None or not wanted.integer:
        return False
    value = strip_unit(unname(text)[1])
    return bool(_ARITHMETIC.fullmatch(value) and _OPERATOR.search(value)) and parse_number(value) is None


def _ask(text: str, gold_text: str, rules: Rules) -> MathQuestion | None:
    """The question for mathematics, if both sides look like it."""
    if _is_undone_sum(text, gold_text, rules) or read_base(text) or read_base(gold_text):
        return None
    text, gold_text = (strip_unit(degrees_to_radians(side, rules.convert_units)) for side in (text, gold_text))
    (name, value), (gold_name, gold_value) = unname(text), unname(gold_text)
    if name and same_name(name, gold_name) or bool(name) != bool(gold_name) and gold_value.startswith("("):
        text, gold_text = value, gold_value
    if gold_text[:1] in "([" and text[:1] not in "([":
        text = as_interval(text)
    if "matrix" in gold_text:
        text = as_matrix(text)
    if not (is_safe_math(text) and is_safe_math(gold_text)):
        return None
    return MathQuestion(text, gold_text)


def _math_question(answer: FinalAnswer, gold: Gold, rules: Rules) -> bool | MathQuestion:
    """The last resort: mathematics, if both sides look like it. Hedges and words are simply wrong."""
    gold_text = strip_unit(gold.text)
    if parse_number(gold.text, gold=True) is None and re.fullmatch(r"[\d\s:]+", gold_text):
        return False
    for reading, is_value in readings(answer):
        text = strip_unit(reading)
        if is_value and "=" in gold_text or HEDGED.search(text) and not HEDGED.search(gold_text):
            continue
        if re.fullmatch(r"[\d\s:]+", text) and ":" in text:
            continue
        if question := _ask(reading, gold.text, rules):
            return question
    return False
