"""Whether two plain texts say the same: by wording, yes/no, ratio, base or number. Choices by the same measures."""

import re
from dataclasses import dataclass
from functools import lru_cache

from apo_lora.rewards.answers.lists import same_name, unname
from apo_lora.rewards.answers.numbers import parse_number, read_base, same_number
from apo_lora.rewards.answers.plain import compact, plain, word_key


@dataclass(frozen=True)
class Rules:
    """What a recipe may allow beyond equality."""

    accept_unevaluated: bool = False
    """"10 + 2" for the whole number 12."""
    convert_units: bool = False
    """"100 cm" for "1 m", and radians for degrees."""


STRICT = Rules()

_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no", "是": "yes", "否": "no", "对": "yes", "错": "no"}
_SAME_MEANING = (
    {r"\emptyset", r"\{\}", "{}", "empty set", "no solution", "no solutions", "no solution exists", "空集", "无解"},
    {"no real solution", "no real solutions"},
    {"does not exist", "doesn't exist", "dne"},
    {"undefined", "not defined"},
)


_SHORT_WORD = re.compile(r"(?<![^\W\d_])[^\W\d_]{1,2}(?![^\W\d_])")


def same_text(a: str, b: str) -> bool:
    """The same writing up to spaces; for plain words also up to case, article, hyphen and spelling."""
    if compact(a) == compact(b):
        return True
    first, second = (re.sub(r"^(?:the|an?) ", "", side.casefold().strip()) for side in (a, b))
    if any(first in row and second in row for row in _SAME_MEANING) or _same_relation(a, b):
        return True
    if any(re.search(r"[\\^=<>+*/|{}]", side) for side in (a, b)):
        return False
    key_a, key_b = word_key(a), word_key(b)
    # Single letters and digits are not words: "x" and "X", "1.2 m" and "1 2 m" are different.
    if key_a != key_b or not re.search(r"[^\W\d_]{2}", key_a):
        return False
    if not re.search(r"\d", key_a):
        return True
    # Case tells short units apart: "5 mW" is not "5 MW".
    return compact(a).casefold() == compact(b).casefold() and _SHORT_WORD.findall(a) == _SHORT_WORD.findall(b)


def _same_relation(a: str, b: str) -> bool:
    """ "AB \\parallel CD" is "CD \\parallel AB"."""
    sides = [re.fullmatch(r"(\S+?)\s*\\(parallel|perp|cong|sim)\s*(\S+)", text) for text in (a, b)]
    if not all(sides):
        return False
    (left, relation, right), (other_left, other_relation, other_right) = (side.groups() for side in sides)
    return relation == other_relation and {left, right} == {other_left, other_right}


def same_value(text: str, gold_text: str, rules: Rules = STRICT) -> bool | None:
    """Yes/no, ratio, base and number against the gold; None where the two are not of one kind."""
    wanted, said = yes_no(gold_text), yes_no(text)
    if wanted and said:
        return wanted == said
    (name, value), (gold_name, gold_value) = unname(text), unname(gold_text)
    if name and gold_name:
        if not same_name(name, gold_name):
            return None
        text, gold_text = value, gold_value
    elif name and ("=" not in text or text.strip().endswith(name)) or gold_name and "=" not in text:
        text, gold_text = value, gold_value
    if same_text(text, gold_text):
        return True
    base, gold_base = read_base(text), read_base(gold_text)
    if base or gold_base:
        is_number = (base or parse_number(text)) and (gold_base or parse_number(gold_text))
        return base == gold_base if is_number else None
    ratio = _same_ratio(text, gold_text)
    if ratio is not None:
        return ratio
    a, b = parse_number(text), parse_number(gold_text, gold=True)
    if a is None or b is None:
        return None
    if same_number(a, b, rules.convert_units):
        return True
    return None if a.comma or b.comma else False


def _same_ratio(text: str, gold_text: str) -> bool | None:
    """ "2:3" equals "2 : 3" and, in lowest terms only, 2/3 (10:30 is a time, not a third)."""
    ratio = r"(?:ratio\s+)?(\d{1,9})\s*(?::|to)\s*(\d{1,9})"
    a, b = re.fullmatch(ratio, text), re.fullmatch(ratio, gold_text)
    if a and b:
        return [int(n) for n in a.groups()] == [int(n) for n in b.groups()] and len(a.group(2)) == len(b.group(2))
    if not a and not b:
        return None
    first, second = (a or b).groups()
    number = parse_number(gold_text if a else text)
    value = parse_number(f"{first}/{second}")
    if number is None or value is None or number.percent or number.unit:
        return None
    return value.value.denominator == int(second) and number.value == value.value


def yes_no(text: str) -> str | None:
    """ "yes" or "no" where the first clause is one of them, or of their like, and no later one contradicts."""
    clauses = [clause.strip().casefold() for clause in re.split(r"[,.;:!]|\s-\s", text)]
    verdict = _YES_NO.get(clauses[0])
    others = {_YES_NO[clause] for clause in clauses[1:] if clause in _YES_NO}
    return None if others - {verdict} else verdict


@lru_cache(maxsize=8192)
def choice_text(choice: str, index: int) -> str:
    """A choice made plain, without its own label ("B. 12" as the second choice is "12")."""
    text = plain(choice)
    label = re.match(rf"(?:\(\s*{chr(65 + index)}\s*\)|{chr(65 + index)}\s*[.):])\s*(\S.*)", text)
    return label.group(1) if label else text


def same_as_choice(text: str, choices: tuple[str, ...]) -> list[int]:
    """Choices that say the same: by wording if any does, else by yes/no and number."""
    texts = [choice_text(choice, index) for index, choice in enumerate(choices)]
    worded = [index for index, choice in enumerate(texts) if same_text(text, choice)]
    return worded or [index for index, choice in enumerate(texts) if same_value(text, choice) is True]
