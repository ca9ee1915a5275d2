"""Gold answers: which choice each names, decided for a data set as a whole, and what the verifier is given.

A 1 may be a choice's label, its text, or its position counted from 0 or from 1. One row rarely tells; all rows together
do, and where even they do not, the data set is refused. Pure functions.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apo_lora.data.choices import Choices, label_of, letter, literal
from apo_lora.data.text import BadRow, as_text, content, short
from apo_lora.errors import DataError

Answer = str | tuple[str, ...]
"""Gold: a text, or several that are each right."""
Reading = Mapping[str, str]
"""Kind of gold, "number" or "letter" -> its name in READINGS."""

_WHOLE = re.compile(r"-?\d{1,9}(?:\.0+)?")
_ONE_NUMBER = re.compile(r"\D*?(-?\d+(?:\.\d+)?)\D*")
_CONTRADICTION = 10
"""A reading must explain this many times the rows that it leaves to another; those few are then errors in the data."""


def _by_label(gold: str, choices: Choices) -> int | None:
    label = _label(gold) or gold.upper()
    return choices.labels.index(label) if label in choices.labels else None


def _by_text(gold: str, choices: Choices) -> int | None:
    for place, text in enumerate(choices.texts):
        if text and gold in (text, choices.raw[place]):
            return place
    number = _number(gold)
    found = [place for place, text in enumerate(choices.texts) if number is not None and _number(text) == number]
    return found[0] if len(found) == 1 else None


def _by_letter(gold: str, choices: Choices) -> int | None:
    label = label_of(gold) or ""
    return ord(label) - ord("A") if re.fullmatch("[A-Z]", label) else None


def _by_position(first: int) -> Callable[[str, Choices], int | None]:
    def place(gold: str, choices: Choices) -> int | None:
        position = int(_label(gold)) - first
        return choices.given[position] if 0 <= position < len(choices.given) else None

    return place


READINGS: Mapping[str, Callable[[str, Choices], int | None]] = {
    "label": _by_label,
    "text": _by_text,
    "letter": _by_letter,
    "from_0": _by_position(0),
    "from_1": _by_position(1),
}
"""Name, as in data.answer_as -> (gold, choices) -> the place of the choice, None where it names none."""
_POSSIBLE = {"number": ("label", "text", "from_0", "from_1"), "letter": ("label", "text", "letter")}


def gold_items(value: Any, choices: Choices | None) -> tuple[str, ...]:
    """The texts of a gold answer, several where it is a list or spells one. Raises BadRow.

    A list of numbers in text ("[1, 2]") is one answer, as an interval or coordinates are, unless the row has choices.
    """
    value = content(value)
    if isinstance(value, str) and re.match(r"\s*\[" if choices else r"\s*\[\s*['\"]", value):
        texts = ["".join(text.split()) for text in (choices.texts if choices else ())]
        value = value if "".join(value.split()) in texts else literal(value) or value
    items = list(value) if isinstance(value, list | tuple) else [value]
    if odd := next((item for item in items if isinstance(item, Mapping | list | tuple)), None):
        if not isinstance(odd, Mapping):
            raise BadRow("no answer", f"the answer is a list of lists: {short(odd)}")
        keys = ", ".join(odd) or "nothing"
        raise BadRow("no answer", f"the answer is a mapping with {keys}; name one of them, as in 'answer.text'")
    texts = tuple(dict.fromkeys(text for item in items if (text := _untagged(as_text(item)))))
    if not texts:
        raise BadRow("no answer", "the answer is empty")
    if len(texts) > 1 and not choices and not all(isinstance(item, str) for item in items):
        raise BadRow("several answers", f"{short(value)}; write one text, or a list of texts that are each right")
    if len(texts) == 1 and choices and _by_text(texts[0], choices) is None:
        return _several_labels(texts[0], choices) or texts
    return texts


def _untagged(text: str) -> str:
    if "<answer>" in text:
        text = text.rsplit("<answer>", 1)[1].split("</answer>", 1)[0]
    return text.strip()


def find_reading(
    rows: Sequence[tuple[int, tuple[str, ...], bool, Choices]], source: str, answer_as: str | None
) -> Reading:
    """How the golds of a data set name choices. `rows`: (number, items, whether the gold was text, choices).

    Raises DataError where rows could be read in several ways; `answer_as` of the recipe decides those.
    """
    found = {}
    for kind, names in _POSSIBLE.items():
        golds = [
            (row, item, typed, choices) for row, items, typed, choices in rows for item in items if _kind(item) == kind
        ]
        if answer_as in names:
            found[kind] = answer_as
        elif golds:
            found[kind] = _decide(kind, golds, names, source)
    return found


def _decide(kind: str, golds: Sequence[tuple[int, str, bool, Choices]], names: Sequence[str], source: str) -> str:
    places = {name: [_place(name, gold, choices) for _, gold, _, choices in golds] for name in names}
    explained = {name: sum(place is not None for place in found) for name, found in places.items()}
    if max(explained.values()) * 2 < len(golds):
        return "text"  # "30" for "30 cm": the verifier knows more of texts than is known here
    fitting = [name for name in names if explained[name] and not any(_beats(places[o], places[name]) for o in names)]
    best, *others = fitting or [name for name in names if explained[name]]
    rivals = [name for name in others if places[name] != places[best]]
    is_plain = best == "label" or best == "text" and kind == "number" and all(typed for _, _, typed, _ in golds)
    if fitting and (is_plain or not rivals):
        return best
    ways = [best, *rivals]
    first = next(i for i, found in enumerate(zip(*(places[w] for w in ways), strict=True)) if len(set(found)) > 1)
    number, gold, _, choices = golds[first]
    raise DataError(
        f"{source}: the answers may name choices in several ways ({', '.join(ways)}), which give other answers (row "
        f"{number}: {gold!r} among {[text for text in choices.texts if text]}); set data.answer_as to the right one"
    )


def _place(name: str, gold: str, choices: Choices) -> int | None:
    place = READINGS[name](gold, choices)
    return place if place is not None and place < len(choices.texts) and choices.texts[place] else None


def _beats(one: Sequence[int | None], other: Sequence[int | None]) -> bool:
    """Whether `one` explains too many rows that `other` does not."""
    only_one = sum(a is not None and b is None for a, b in zip(one, other, strict=True))
    only_other = sum(a is None and b is not None for a, b in zip(one, other, strict=True))
    return only_one * _CONTRADICTION > only_other and only_one > 0


def resolve(items: tuple[str, ...], choices: Choices | None, reading: Reading) -> Answer:
    """The gold for the verifier: a letter where the reading says which choice it is, letters ("A, C") for several.

    Without choices, several texts are each right, but several letters are all meant. Raises BadRow.
    """
    if choices is None:
        return _open_answer(items)
    places = [_place_of(item, choices, reading) for item in items]
    if len(items) == 1:
        is_text = places[0] is None or _kind(items[0]) != "letter" and items[0] == choices.texts[places[0]]
        return items[0] if is_text else letter(places[0])
    if None in places:
        raise BadRow("unparsable gold", f"{short(items[places.index(None)])} is none of {len(choices.texts)} choices")
    return ", ".join(map(letter, sorted(set(places))))


def _place_of(item: str, choices: Choices, reading: Reading) -> int | None:
    kind = _kind(item)
    name = reading.get(kind, "text")
    if kind is None:  # a text, or a label such as "ii" or "Б"
        by_text, by_label = _place("text", item, choices), _place("label", item, choices)
        return by_label if by_text is None else by_text
    place = _place(name, item, choices)
    if place is None and name in ("from_0", "from_1"):
        raise BadRow(
            "unparsable gold", f"{item} is not a position among {len(choices.given)} choices, counted from {name[-1]}"
        )
    if place is None and kind == "letter" and _label(item) in map(letter, range(len(choices.texts))):
        raise BadRow("unparsable gold", f"the row has no choice {_label(item)}")
    return place


def _open_answer(items: tuple[str, ...]) -> Answer:
    if len(items) == 1:
        return items[0]
    if all(re.fullmatch(r"\(?[A-Z]\)?\.?", item) for item in items):
        return ", ".join(sorted(label_of(item) for item in items))
    numbers = [float(item) for item in items if re.fullmatch(r"-?\d+(?:\.\d+)?", item)]
    if numbers and max(numbers) - min(numbers) > 0.01 * max(map(abs, numbers)):
        raise BadRow("several answers", f"{short(list(items))} are different numbers; if all are meant, write one text")
    return items


def _several_labels(text: str, choices: Choices) -> tuple[str, ...] | None:
    """The parts of "A, C", "B and D", "1;3" or "BD" where each is a label, or a letter, of the row."""
    parts = [part for part in re.split(r"[\s,;/&、]+|\band\b", text) if part]
    if len(parts) == 1 and re.fullmatch("[A-Z]{2,8}", text):
        parts = list(text)
    known = choices.labels or tuple(letter(place) for place in range(len(choices.texts)))
    is_several = 1 < len(parts) == len(set(parts)) and all(label_of(part) in known for part in parts)
    return tuple(parts) if is_several else None


def _kind(gold: str) -> str | None:
    label = _label(gold) or ""
    is_number = label.removeprefix("-").isdecimal()
    return "number" if is_number else "letter" if re.fullmatch("[A-Z]", label) else None


def _label(gold: str) -> str | None:
    """ "2" of "2.0", and "2" of "(2)"."""
    return str(int(float(gold))) if _WHOLE.fullmatch(gold) else label_of(gold)


def _number(text: str) -> float | None:
    match = _ONE_NUMBER.fullmatch(text)
    return float(match[1]) if match else None
