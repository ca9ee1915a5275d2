"""Letters of options: bare, in a list, before their text, or named in a sentence. No verdicts, only what is said."""

import re
from collections.abc import Sequence

from apo_lora.rewards.answers.denials import HEDGED, NEGATED
from apo_lora.rewards.answers.plain import plain

# A letter in its usual formats: "B", "(B)", "B.", "Option B", "figure (B)", "B) 12", "B: text".
_NAMES = (
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|final\s+)?"
    r"(?:option|choice|answer|letter|figure|fig\.?|image|picture|diagram|graph|shape|pattern|panel|选项|答案)\s*:?\s*)?"
)
_BARE = re.compile(rf"{_NAMES}[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:,)]?(?:选项)?", re.IGNORECASE)
_LABEL = re.compile(
    rf"{_NAMES}(?:[(\[]\s*([A-Za-z])\s*[)\]]\s*[.:,-]?\s*|([A-Za-z])\s*\)\s*|([A-Za-z])\s*[.:]\s+"
    r"|([A-Z])\s+(?:-\s+)?|([A-Z])[.:,]\s*)(\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_EXPLICIT = re.compile(
    r"\(\s*([A-Z])\s*\)|\b(?:[Oo]ption|[Cc]hoice|[Ff]igure)\s+([A-Z])(?![A-Za-z])|选项\s*([A-Z])(?![A-Za-z])"
)
# Another letter, after "C: ", that is more than a word: "(B)", "B.", "B, ", or "B" at the end.
_OTHER = re.compile(r"(?<![\w\\])([A-Z])\s*[).:,;]|(?<![\w\\])([A-Z])$")
_BETWEEN = re.compile(r"\s*[,/;&和]\s*(?:and\s+)?|\s+(?:and\s+)?|(?<=\))(?=\()")


_EQUATED = re.compile(r"([A-Z])\s*(?::?=|\s(?:is|equals)\s)\s*(\S.*)|(\S.*?)\s*=\s*([A-Z])")


def equated(text: str) -> tuple[int, str] | None:
    """(index, the rest) of "C = 5", "C is 5" or "5 = C": a label, or a variable of that name; None for others."""
    match = _EQUATED.fullmatch(text)
    return match and (ord(match[1] or match[4]) - 65, match[2] or match[3])


def bare_letter(text: str) -> int | None:
    """The index of a letter that is the whole text: "B", "(b)", "Option B."; None for anything else."""
    match = _BARE.fullmatch(text.strip())
    return ord(match.group(1).upper()) - 65 if match else None


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """The index of the choice whose letter, or whose own text, is the whole text; None for anything else."""
    if text in choices and not re.fullmatch("[A-Z]", text):
        return choices.index(text)  # "(b)", where the choices are themselves letters
    letter = bare_letter(text)
    return letter if letter is not None and letter < len(choices) else None


def several_letters(text: str) -> frozenset[int]:
    """The letters of "A, C", "A and C", "(A)(C)", "A C", "BD" or "ACD": two or more, those of a run as a rule in their
    order. None of anything else, "A or C" included."""
    if re.fullmatch("[A-F]{2,6}", text) and list(text) == sorted(set(text)):
        return frozenset(ord(letter) - 65 for letter in text)
    letters = {bare_letter(part) for part in _BETWEEN.split(text.strip()) if part.strip()}
    return frozenset(letters) if len(letters) > 1 and None not in letters else frozenset()


def labelled(text: str) -> tuple[int, str, bool] | None:
    """(index, the rest, weak) of "B) 12". Weak: "A dog", "B, 12" may be no label; the rest must be that choice."""
    match = _LABEL.fullmatch(text)
    if match is None:
        return None
    letter = next(group for group in match.groups()[:5] if group)
    rest = plain(match.group(6))
    if rest.startswith("(") and rest.endswith(")") and rest.count("(") == 1 and len(rest) > 3:
        rest = rest[1:-1]  # "C (square)"
    return ord(letter.upper()) - 65, rest, bool(match.group(4) or match.group(5))


def is_rivalled(index: int, rest: str, count: int) -> bool:
    """Whether what follows a label takes it back: another letter, a hedge, "is wrong". "Not B or C" does not."""
    if NEGATED.match(rest):
        return False
    others = {ord(a or b) - 65 for a, b in _OTHER.findall(rest)} | ({bare_letter(rest)} - {None})
    wrong = re.match(r"(?:is|are|was|can|could|would|isn't|can't)\b", rest) and NEGATED.search(rest)
    return any(other != index and other < count for other in others) or bool(HEDGED.search(rest) or wrong)


def explicit_letter(text: str) -> tuple[int, str] | None:
    """(index, what is said beside it) of "so option C is correct", if one letter is named and nothing taken back."""
    if NEGATED.search(text) or HEDGED.search(text):
        return None
    letters = {a or b or c for a, b, c in _EXPLICIT.findall(text)}
    return (ord(letters.pop()) - 65, plain(_EXPLICIT.sub("", text))) if len(letters) == 1 else None
