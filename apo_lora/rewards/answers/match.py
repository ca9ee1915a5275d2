"""Cheap comparison of an answer with the gold answer: same text, letter, yes/no, number. No sympy.

`judge` answers True or False where the texts decide it, and hands back a `MathQuestion` where only mathematics can.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from apo_lora.rewards.answers.mathematics import is_safe_math, math_equal
from apo_lora.rewards.answers.numbers import Number, parse_number, same_number, strip_unit
from apo_lora.rewards.answers.text import (
    MAX_ANSWER_CHARS,
    FinalAnswer,
    after_answer_phrase,
    compact,
    last_box,
    plain,
    word_key,
)


@dataclass(frozen=True)
class MathQuestion:
    """Are these two safe plain texts mathematically equal?"""

    answer: str
    gold: str


@dataclass(frozen=True)
class Gold:
    """What counts as right. `index` is the right choice (None for an open question), `text` its wording."""

    text: str
    index: int | None
    choices: tuple[str, ...]
    letter: bool  # an open question whose gold is a bare letter


# A letter in its usual formats: "B", "(B)", "B.", "Option B", "figure (B)", "B) 12", "B: text".
_LETTER_NAMES = (
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|final\s+)?"
    r"(?:option|choice|answer|letter|figure|fig\.?|image|picture|diagram|graph|shape|pattern|panel|选项|答案)\s*:?\s*)?"
)
_BARE_LETTER = re.compile(rf"{_LETTER_NAMES}[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:,)]?", re.IGNORECASE)
_LABELLED = re.compile(
    rf"{_LETTER_NAMES}(?:[(\[]\s*([A-Za-z])\s*[)\]]\s*[.:,-]?\s*|([A-Za-z])\s*\)\s*|([A-Za-z])\s*[.:]\s+"
    r"|([A-Z])\s+(?:-\s+)?|([A-Z])[.:,]\s*)(\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_EXPLICIT_LETTER = re.compile(r"\(\s*([A-Z])\s*\)|\b(?:[Oo]ption|[Cc]hoice|[Ff]igure|选项)\s+([A-Z])\b")
# Another letter, after "C: ", that is more than a word: "(B)", "B.", "B, ", or "B" at the end.
_OTHER_LETTER = re.compile(r"(?<![\w\\])([A-Z])\s*[).:,;]|(?<![\w\\])([A-Z])$")
_NEGATED = re.compile(
    r"\b(?:not|no|neither|nor|except|wrong|incorrect|eliminate[sd]?|unlike|false|cannot|rule[sd]? out)\b|n't\b", re.I
)
_HEDGE = re.compile(r"(?<![a-zA-Z])(?:or|either|maybe|perhaps|possibly)(?![a-zA-Z])|或", re.IGNORECASE)
_MAX_GOLD_CHARS = 100_000  # a whole solution may come with it, after which "####" or a box gives the answer
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no", "是": "yes", "否": "no", "对": "yes", "错": "no"}


@lru_cache(maxsize=4096)
def read_gold(answer: str, choices: tuple[str, ...]) -> Gold | None:
    """The gold answer made plain; None where no answer could ever be judged against it."""
    if len(answer) > _MAX_GOLD_CHARS:
        return None
    text = plain(last_box(answer) or answer.split("####")[-1])
    if (
        not text
        or len(text) > MAX_ANSWER_CHARS
        or not (re.search(r"\w|∅|\\infty", text))
        or text.count("{") != text.count("}")
    ):
        return None
    if not choices:
        return Gold(text, None, (), letter=bool(re.fullmatch(r"\(?[A-Z]\)?", text)))
    index = _gold_index(text, choices)
    return None if index is None else Gold(_choice_text(choices[index], index), index, choices, letter=False)


def _gold_index(text: str, choices: tuple[str, ...]) -> int | None:
    letter = _bare_letter(text)
    if letter is not None and letter < len(choices):
        return letter
    found = _same_as_choice(text, choices)
    if not found:
        found = [i for i, choice in enumerate(choices) if math_equal(strip_unit(text), strip_unit(plain(choice)))]
    if not found:
        labelled = _labelled(text, choices)
        return labelled if labelled is not None and labelled >= 0 else None
    return found[0]


def judge(answer: FinalAnswer, gold: Gold) -> bool | MathQuestion:
    """The verdict on a final answer, or the one question that mathematics must decide."""
    last = ""
    for reading, is_value in _readings(answer):
        if is_value and not gold.choices and "=" in gold.text:
            continue  # "y = 5" is not "x = 5"
        verdict = _judge_choice(reading, gold, is_value) if gold.choices else _judge_open(reading, gold)
        if verdict is not None:
            return verdict
        last = last or ("" if is_value else reading)
    if gold.choices and (letter := _only_explicit_letter(plain(answer.text))) is not None:
        return letter == gold.index
    return _math_question(answer, gold)


_IS = re.compile(r"\b(?:is|are|equals?|be|was|were|choose|select|pick)\b")


def _readings(answer: FinalAnswer) -> Iterator[tuple[str, bool]]:
    """(reading, is a bare value) from the most literal to the loosest.

    Looser ones are the end of "the answer is ...", of "... is 5", and of "x = 5". In a tag or a box, text that says
    such a thing twice or has several sentences is read literally only: its end could be one of many tries.
    """
    text = plain(answer.text)
    if len(text) > MAX_ANSWER_CHARS:  # one sign of Unicode may be eighteen once it is made plain
        return
    yield text, False
    phrase = after_answer_phrase(text) if answer.sentence or text.lower().count("answer") < 2 else None
    if phrase:
        yield plain(phrase), False
        text = plain(phrase)
    if not answer.sentence and (_HEDGE.search(text) or re.search(r"\n|[.;?!]\s", text) or len(_IS.findall(text)) > 1):
        return
    tail = re.search(rf".*{_IS.pattern}\s*:?\s*(\S.*)$|.*[a-z]:\s+(\S.*)$", text, re.DOTALL)
    if tail:
        yield plain(tail.group(1) or tail.group(2)), False
    value = _right_side(text)
    if value:
        yield value, True
    spans = re.findall(r"\$+([^$]+)\$+|\\[(\[](.+?)\\[)\]]", answer.text)
    if answer.sentence and len(spans) == 1:  # "Therefore $x \\ge 5$ is the solution"
        yield plain(spans[0][0] or spans[0][1]), True
    lone = _PROSE.fullmatch(text) if answer.sentence else None
    if lone and not _NEGATED.search(text) and not _HEDGE.search(text):
        yield lone.group(1), True  # "So he earns 1,080 a month": words and one number


_PROSE = re.compile(r"[A-Za-z' ,]*[a-z]{2,}[ ,]+(-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?)(?:[ .,][A-Za-z' .,]*)?")
_RELATION = re.compile(r"(?<![<>!\\])=(?!=)|\\approx(?![a-z])")


def _right_side(text: str) -> str | None:
    """The value of "x = 5", "AB = 2 + 3 = 5", "x = 1/3 \\approx 0.333" (its exact side)."""
    exact = text.split("\\approx")[0] if re.search(r"\d.*\\approx", text) else text
    pieces = [piece.strip() for piece in _RELATION.split(exact)]
    if len(pieces) < 2 and exact == text or "," in text and text.count("=") > 1:
        return None
    return plain(pieces[-1]) if pieces[-1] and not re.fullmatch(r"[a-zA-Z]", pieces[-1]) else None


def _judge_open(text: str, gold: Gold) -> bool | None:
    if same_text(text, gold.text):
        return True
    if gold.letter:
        letter = _bare_letter(text)
        letter = _labelled(text, ()) if letter is None else letter
        return None if letter is None else letter == _bare_letter(gold.text)
    if _HEDGE.search(text) and not _HEDGE.search(gold.text):
        return None
    return _same_value(text, gold.text)


def _same_value(text: str, gold_text: str) -> bool | None:
    """Yes/no, ratio and number against the gold; None where the two are not of one kind."""
    wanted, said = _yes_no(gold_text), _yes_no(text)
    if wanted and said:
        return wanted == said
    gold_value = gold_text
    if re.fullmatch(r"[a-zA-Z\\][\w\\ ^{}°:]{0,30}=[^=<>]+", gold_text) and "=" not in text:
        gold_value = plain(gold_text.split("=")[1])
        if same_text(text, gold_value):
            return True
    ratio = _same_ratio(text, gold_value)
    if ratio is not None:
        return ratio
    a, b = parse_number(text), parse_number(gold_value, gold=True)
    if a is None or b is None:
        return None
    if same_number(a, b):
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


def _yes_no(text: str) -> str | None:
    clauses = [clause.strip().casefold() for clause in re.split(r"[,.;:!]|\s-\s", text)]
    verdict = _YES_NO.get(clauses[0])
    others = {_YES_NO[clause] for clause in clauses[1:] if clause in _YES_NO}
    return None if others - {verdict} else verdict


def _judge_choice(text: str, gold: Gold, is_value: bool) -> bool | None:
    if not is_value and (letter := _bare_letter(text)) is not None and letter < len(gold.choices):
        return letter == gold.index
    same = _same_as_choice(text, gold.choices)
    if same:
        return _is_gold(same, gold)
    if is_value:
        return None
    labelled = _labelled(text, gold.choices)
    if labelled is not None:
        return labelled == gold.index
    named = {_bare_letter(part) for part in re.split(r",|/|;|&|\s+|\band\b|\bor\b", text) if part.strip()}
    return False if len(named) > 1 and None not in named and max(named) < len(gold.choices) else None


def _is_gold(found: list[int], gold: Gold) -> bool:
    """Right if only the gold choice fits; two choices of the same wording are the same choice."""
    return all(same_text(_choice_text(gold.choices[i], i), gold.text) for i in found)


@lru_cache(maxsize=8192)
def _choice_text(choice: str, index: int) -> str:
    """A choice made plain, without its own label ("B. 12" as the second choice is "12")."""
    text = plain(choice)
    label = re.match(rf"(?:\(\s*{chr(65 + index)}\s*\)|{chr(65 + index)}\s*[.):])\s*(\S.*)", text)
    return label.group(1) if label else text


def _same_as_choice(text: str, choices: tuple[str, ...]) -> list[int]:
    """Choices that say the same: by wording if any does, else by yes/no and number."""
    texts = [_choice_text(choice, index) for index, choice in enumerate(choices)]
    worded = [index for index, choice in enumerate(texts) if same_text(text, choice)]
    if worded:
        return worded
    return [index for index, choice in enumerate(texts) if _same_value(text, choice) is True]


def same_text(a: str, b: str) -> bool:
    """The same writing up to spaces; for plain words also up to case, article, hyphen and spelling."""
    if compact(a) == compact(b):
        return True
    if any(re.search(r"[\\^=<>+*/|{}]", side) for side in (a, b)):
        return False
    key_a, key_b = word_key(a), word_key(b)
    # Single letters and digits are not words: "x" and "X", "1.2 m" and "1 2 m" are different.
    if key_a != key_b or not re.search(r"[^\W\d_]{2}", key_a):
        return False
    return not re.search(r"\d", key_a) or compact(a).casefold() == compact(b).casefold()


def _bare_letter(text: str) -> int | None:
    match = _BARE_LETTER.fullmatch(text.strip())
    return ord(match.group(1).upper()) - 65 if match else None


def _labelled(text: str, choices: tuple[str, ...]) -> int | None:
    """The letter of "B) 12"; -1 where what follows names another choice; None where there is no label.

    "A dog" is not a label: after a space (or a mere comma or hyphen) the rest must be that choice's own text.
    """
    match = _LABELLED.fullmatch(text)
    if match is None:
        return None
    letter = next(group for group in match.groups()[:5] if group)
    index, rest = ord(letter.upper()) - 65, plain(match.group(6))
    if rest.startswith("(") and rest.endswith(")") and rest.count("(") == 1:
        rest = rest[1:-1]  # "C (square)"
    if choices and index >= len(choices):
        return None
    same = _same_as_choice(rest, choices) if choices else []
    weak = match.group(4) or match.group(5)
    if weak:
        return index if index in same else None
    others = {ord(a or b) - 65 for a, b in _OTHER_LETTER.findall(rest)} | ({_bare_letter(rest)} - {None})
    rivals = [other for other in others if other != index and other < (len(choices) or 5)]
    if index not in same and (same or rivals or _HEDGE.search(rest)):
        return -1
    return index


def _only_explicit_letter(text: str) -> int | None:
    """The letter of "so option C is correct", if exactly one is named and nothing is negated or hedged."""
    if _NEGATED.search(text) or _HEDGE.search(text):
        return None
    letters = {a or b for a, b in _EXPLICIT_LETTER.findall(text)}
    return ord(letters.pop()) - 65 if len(letters) == 1 else None


def _math_question(answer: FinalAnswer, gold: Gold) -> bool | MathQuestion:
    """The last resort: mathematics, if both sides look like it. Hedges and words are simply wrong."""
    gold_text = strip_unit(gold.text)
    if not is_safe_math(gold_text):
        return False
    if parse_number(gold.text, gold=True) is None and re.fullmatch(r"[\d\s:]+", gold_text):
        return False
    for reading, is_value in _readings(answer):
        text = strip_unit(reading)
        if is_value and "=" in gold_text or _HEDGE.search(text) and not _HEDGE.search(gold_text):
            continue
        if re.fullmatch(r"[\d\s:]+", text) and ":" in text:
            continue
        if is_safe_math(text):
            return MathQuestion(text, gold_text)
    return False


def describes_number(text: str) -> Number | None:
    """The number that a plain gold text is, if it is one (for making wrong answers)."""
    return parse_number(plain(text), gold=True)
