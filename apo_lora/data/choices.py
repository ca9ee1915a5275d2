"""The choices of a row, in any layout: their texts, and the labels that the row itself gives them. Pure functions."""

import ast
import json
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apo_lora.data.text import BadRow, as_text, content, short

MAX_CHOICES = 26
_MAX_CHARS = 100_000
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X")
_SEQUENCES = (
    *(string.ascii_uppercase, _ROMAN, [str(n) for n in range(1, 100)], [str(n) for n in range(100)]),
    *("АБВГДЕЖЗИ", "甲乙丙丁戊己庚辛壬癸", "가나다라마바사", "ㄱㄴㄷㄹㅁㅂ", "アイウエオカキ", "ΑΒΓΔΕΖ"),
)
"""What rows count their choices with. Of several that fit (C, D are also Roman numbers), the first one counts."""
_WORD = r"(?:(?:option|choice|answer|选项)[\s_]*)?"
_LABEL = rf"{_WORD}[(\[{{<【]?\s*([A-Za-z]{{1,4}}|\d{{1,2}}|[^\W\d_a-zA-Z])\s*"
# After a label: a bracket, a stop, a colon (but "a:b" is a ratio), a dash before a word, or only space after a letter.
_BEFORE_TEXT = re.compile(
    rf"{_LABEL}(?:[)\]}}>】]\s*[.:]?|[.、。](?!\d)|(?<!\d):(?=\s|\S\S)|[:/](?=\s+[^\W\d_])|\s+[-–—]\s+(?=[^\W\d_]{{2}})|\t|(?-i:(?<=[A-Z])\s(?=\w)))\s*",
    re.IGNORECASE,
)
_ENCLOSED = re.compile(r"\s*([①-ⓩ])\s*")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_BARE = re.compile(rf"{_LABEL}[)\]}}>】]?\s*[.:、。]?", re.I)
_TEXT_KEYS, _LABEL_KEYS = ("text", "value", "content", "option", "choice"), ("label", "key", "id", "letter")
_NOTHING = ("", "nan", "none", "null", "n/a", "[]", "{}")


@dataclass(frozen=True)
class Choices:
    """`texts[i]` is what the letter i stands for, "" where the row has no such choice."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """The row's own labels by place, in capitals; () where it has none."""
    given: tuple[int, ...] = ()
    """The places in the order of the row, for answers that are positions."""
    raw: tuple[str, ...] = ()
    """The texts by place as the row wrote them, with their labels."""


def read_choices(value: Any) -> Choices | None:
    """Choices from a list, a mapping of labels, label/text pairs, or text of any of these; None where there are none.

    Letters keep their places: of {"B": "dog", "C": "cow"}, and of a list with a hole, B is B. Raises BadRow.
    """
    value = content(value)
    if isinstance(value, str):
        value = None if value.strip().lower() in _NOTHING else list_in_text(value)
    if value is None or isinstance(value, float):
        return None
    labels, texts = _labels_and_texts(value)
    if odd := [text for text in texts if isinstance(text, Mapping | list)]:
        raise BadRow("choices unreadable", f"a choice must be text, not {short(odd[0])}")
    raw = [text if (text := as_text(item).strip()) != "nan" else "" for item in texts]
    while raw and not raw[-1]:  # padding
        raw.pop()
    if labels is None:
        labels, texts = _own_labels(raw)
    else:
        labels, texts = [as_text(label).strip() for label in labels[: len(raw)]], raw
    return _placed(labels, texts, raw) if any(texts) else None


def _labels_and_texts(value: Any) -> tuple[list[Any] | None, list[Any]]:
    if isinstance(value, Mapping):
        columns = [_key(value, keys) for keys in (_LABEL_KEYS, _TEXT_KEYS)]
        if isinstance(columns[1], list | tuple):
            return columns[0], list(columns[1])
        keys = [str(key) for key in value]
        order = sorted(value, key=lambda key: (len(str(key)), str(key))) if all(map(label_of, keys)) else list(value)
        return order, [value[key] for key in order]
    if not isinstance(value, list | tuple):
        raise BadRow("choices unreadable", short(value))
    if value and all(isinstance(item, Mapping) for item in value):
        labels = [_key(item, _LABEL_KEYS) for item in value]
        return None if None in labels else labels, [_key(item, _TEXT_KEYS) or item for item in value]
    if value and all(isinstance(item, list | tuple) and len(item) == 2 for item in value):
        return [item[0] for item in value], [item[1] for item in value]
    return None, list(value)


def _key(mapping: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((mapping[key] for key in keys if mapping.get(key) is not None), None)


def _own_labels(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels that the texts begin with, and what is left of them; no labels where they do not count on and on."""
    matches = [_split_label(text) for text in texts if text]
    if len(matches) < 2 or not all(matches) or _sequence([label for label, _ in matches]) is None:
        return [], list(texts)
    if len({rest for _, rest in matches}) < len(matches):  # "A level", "B level"
        return [], list(texts)
    split = iter(matches)
    pairs = [next(split) if text else ("", "") for text in texts]
    return [label for label, _ in pairs], [rest for _, rest in pairs]


def _split_label(text: str) -> tuple[str, str] | None:
    """("B", "dog") of "B. dog", "(b) dog", "Ｂ、dog", "② dog" ("2"); None without a label."""
    match = _ENCLOSED.match(text) or _BEFORE_TEXT.match(text.translate(_FULL_WIDTH))
    label, rest = (label_of(match[1]), text[match.end() :]) if match else (None, "")
    return (label, rest) if label and rest else None


def _sequence(labels: Sequence[str]) -> Sequence[str] | None:
    """The sequence that the labels go through, without a gap unless they are capital letters."""
    if all(label in tuple(string.ascii_uppercase) for label in labels) and list(labels) == sorted(set(labels)):
        return string.ascii_uppercase
    for sequence in _SEQUENCES:
        start = sequence.index(labels[0]) if labels[0] in tuple(sequence) else -1
        if start >= 0 and list(labels) == list(sequence[start : start + len(labels)]):
            return sequence
    return None


def _placed(labels: list[str], texts: Sequence[str], raw: Sequence[str]) -> Choices:
    """Choices by place: that of its letter where the labels are letters, else one after the other."""
    labels = [label_of(label) or label.upper() for label in labels]
    if labels and all(label in tuple(string.ascii_uppercase) for label in labels):
        if len(set(labels)) < len(labels):
            raise BadRow("choices unreadable", f"two choices have the same label among {', '.join(labels)}")
        given = [ord(label) - ord("A") for label in labels]
    else:
        given = list(range(len(texts)))
    size = max(given) + 1
    if size > MAX_CHOICES:
        raise BadRow("too many choices", f"{size}; at most {MAX_CHOICES} are supported")
    at = {place: number for number, place in enumerate(given)}

    def by_place(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(values[at[place]] if place in at else "" for place in range(size))

    return Choices(by_place(texts), by_place(labels) if labels else (), tuple(given), by_place(raw))


def label_of(text: str) -> str | None:
    """The label that "(b)", "B.", "Option B" or "②" is: "B", "B", "B", "2"; None where the text is more than that."""
    plain = unicodedata.normalize("NFKC", text.strip())
    match = _BARE.fullmatch(plain)
    return match[1].upper() if match else None


# --- choices as text -------------------------------------------------------------------------------------------------

_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_NUMPY = re.compile(rf"\[\s*{_QUOTED}(?:\s+{_QUOTED})+\s*\]|\[\s*[-+\d.e]+(?:\s+[-+\d.e]+)+\s*\]", re.DOTALL)
_SIDE_BY_SIDE = re.compile(rf"{_QUOTED}\s+{_QUOTED}", re.DOTALL)


def list_in_text(text: str) -> list[Any] | Mapping[Any, Any]:
    """A list or mapping in JSON, in Python's or NumPy's spelling; else one choice a line, or "A. one; B. two".

    Only literals are read: nothing is ever executed. Raises BadRow.
    """
    text = text.strip()
    if len(text) <= _MAX_CHARS:
        if (value := literal(text)) is not None:
            return value
        labels = ("[A-Z]", "[a-z]", r"\d{1,2}(?=\s*[.)、]\D)")
        found = (lettered(text, r"(?<![A-Za-z\d])", label) for label in labels if re.match(rf"\(?{label}", text))
        if (options := next(filter(None, found), None)) is not None:
            return options
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) > 1 and text[0] not in "[{(":
            return lines
    raise BadRow("choices unreadable", short(text))


def literal(text: str) -> list[Any] | Mapping[Any, Any] | None:
    """The list, tuple or mapping that a text of at most 100,000 characters spells; None where it is none."""
    if array := re.fullmatch(r"array\(\s*(\[.*\])\s*(?:,\s*dtype=.*)?\)", text.strip(), re.DOTALL):
        text = array[1]
    if len(text) > _MAX_CHARS or text.strip()[:1] not in ("[", "{", "("):
        return None
    if _NUMPY.fullmatch(text.strip()):
        return [
            ast.literal_eval(item) if item[0] in "'\"" else item for item in re.findall(rf"{_QUOTED}|[-+\d.e]+", text)
        ]
    for parse in (json.loads, _python_literal):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return list(value) if isinstance(value, tuple) else value if isinstance(value, list | dict) else None
    return None


def _python_literal(text: str) -> Any:
    if _SIDE_BY_SIDE.search(text):
        raise ValueError("Python would read two texts without a comma between them as one")
    return ast.literal_eval(re.sub(r"(?<=[\[,(])\s*nan\s*(?=[\],)])", "None", text.strip()))


def lettered(text: str, before: str = r"^\s*", label: str = "[A-Z]") -> dict[str, str] | None:
    """The options of "A: one", "(B) two" by their labels, which count on from A; None where that is not so."""
    found = list(re.finditer(rf"{before}(?:\(({label})\)|({label})\s*[.:)、．：）])\s*", text, re.MULTILINE))
    labels = [(match[1] or match[2]).upper() for match in found]
    if len(found) < 2 or labels not in [list(sequence[: len(labels)]) for sequence in _SEQUENCES]:
        return None
    ends = [match.start() for match in found[1:]] + [len(text)]
    options = [text[match.end() : end].strip().rstrip(",; ") for match, end in zip(found, ends, strict=True)]
    return dict(zip(labels, options, strict=True)) if all(options) else None


# --- choices in the prompt -------------------------------------------------------------------------------------------


def choice_lines(problem: str, texts: Sequence[str] | None) -> str:
    """`A. first` and so on, a line each; empty where the problem shows its choices already."""
    choices = {letter(place): text for place, text in enumerate(texts or ()) if text}
    squeezed = " ".join(problem.split())
    shown = (rf"(?<!\w){name}\s*[.):]\s*{re.escape(' '.join(text.split()))}" for name, text in choices.items())
    if all(re.search(pattern, squeezed) for pattern in shown):
        return ""
    return "\n".join(f"{name}. {text}" for name, text in choices.items())


def letter(place: int) -> str:
    return string.ascii_uppercase[place]
