"""Reading a number out of plain text, exactly: digits, fractions, mixed numbers, percent, money, units."""

import re
from dataclasses import dataclass
from fractions import Fraction

from apo_lora.rewards.answers.units import in_base_units, same_unit, unit_after

_REL_TOLERANCE = Fraction(1, 10**6)
_LONG_DECIMALS = 6  # from here on a decimal is taken as a rounded value, below as written
_MAX_DIGITS = 40
_MAX_TEN_POWER = 60


@dataclass(frozen=True)
class Number:
    """A value with what was written round it. `value` of "50%" is 50, with `percent` set."""

    value: Fraction
    percent: bool = False
    unit: str = ""
    rounded: bool = False  # not exact as written: a long decimal
    integer: bool = False
    comma: bool = False  # "1,5": a decimal comma, or a list of two


_PLAIN = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|[1-9]\d{0,2}(?: \d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_SIGNED = rf"\s*[-+]?\s*(?:{_PLAIN})\s*"
_FRACTION = rf"\\frac\s*\{{({_SIGNED})\}}\s*\{{({_SIGNED})\}}"
_TIMES_TEN = r"(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*"
_READERS = tuple((kind, re.compile(pattern)) for kind, pattern in (
    ("mixed", r"(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?<=\d) (\d+)\s*/\s*(\d+))"),
    ("fraction", rf"(?:{_FRACTION}|({_PLAIN})\s*/\s*({_PLAIN}))"),
    ("scientific", rf"({_PLAIN})\s*(?:{_TIMES_TEN}\{{?\s*\(?([-+]?\d+)\)?\s*\}}?|[eE]([-+]?\d+))"),
    ("comma", r"(0,\d+|\d+,\d{1,2}|\d+,\d{4,})(?![\d,])"),
    ("plain", rf"({_PLAIN})"),
))  # fmt: skip

_COUNTING = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: value for value, word in enumerate(_COUNTING.split())}
_NUMBER_WORDS |= {word: 10 * tens for tens, word in enumerate(_TENS.split(), start=2)}
_MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "百": 100, "千": 10**3, "万": 10**4, "萬": 10**4, "만": 10**4, "亿": 10**8, "億": 10**8, "억": 10**8}  # fmt: skip

_LEAD = re.compile(
    r"^(?:about|approximately|approx\.?|roughly|around|exactly|only|大?约|\\approx|~|=|:|rs\.?|usd|us)\s*",
    re.IGNORECASE,
)
_DIGITS_GO_ON = re.compile(r"[\d.]\d|,\d|[\^_/!]")
_CURRENCY = re.compile(r"^([-+]?)\s*[€£¥₹$₽₩]\s*")


def parse_number(text: str, gold: bool = False) -> Number | None:
    """The number that the whole of `text` is, unit allowed; None if there is anything else in it.

    `gold`: "3m" in a gold answer is algebra, in an answer it is three metres.
    """
    text = _LEAD.sub("", text.strip())
    text = _CURRENCY.sub(r"\1", text.rstrip("€£¥₹$₽₩ "))
    if len(text) > 200:
        return None
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1 and "," not in text:
        text = text[1:-1].strip()  # "(4,7)" is a pair
    text = _digits_for_words(text)
    sign = re.match(r"[-+]?\s*", text).group()
    body = text[len(sign) :]
    for kind, pattern in _READERS:
        match = pattern.match(body)
        if match and len(match.group()) <= 2 * _MAX_DIGITS and not _DIGITS_GO_ON.match(body, match.end()):
            return _read(kind, match, -1 if "-" in sign else 1, body[match.end() :], gold)
    return None


def _digits_for_words(text: str) -> str:
    """ "twenty-five apples" to "25 apples"."""
    total = current = end = 0
    for match in re.finditer(r"(?:\s*-?\s*(?:\band\s+)?)\b([a-z]+)\b", text.lower()):
        word = match.group(1)
        value = _NUMBER_WORDS.get(word)
        if match.start() != end:
            break
        if value is not None and (not current % 100 or current % 100 >= 20 > 10 > value and not current % 10):
            current += value
        elif word == "hundred" and 0 < current < 10:
            current *= 100
        elif word in ("thousand", "million") and current:
            total, current = total + current * _MULTIPLIERS[word], 0
        else:
            break
        end = match.end()
    return f"{total + current}{text[end:]}" if end else text


def _read(kind: str, match: re.Match, sign: int, rest: str, gold: bool) -> Number | None:
    parts = [part for part in match.groups() if part is not None]
    decimals = len(parts[0].rpartition(".")[2]) if "." in parts[0] else 0
    try:
        value = sign * _value(kind, parts)
    except (ZeroDivisionError, ValueError):
        return None
    tail = _read_rest(rest, gold)
    if tail is None:
        return None
    factor, percent, unit = tail
    value *= factor
    return Number(
        value=value, percent=percent, unit=unit, rounded=decimals >= _LONG_DECIMALS and kind in ("plain", "scientific"),
        integer=value.denominator == 1 and decimals == 0, comma=kind == "comma",
    )  # fmt: skip


def _value(kind: str, parts: list[str]) -> Fraction:
    if kind == "mixed":
        return Fraction(int(parts[0])) + Fraction(int(parts[1]), int(parts[2]))
    if kind == "fraction":
        return _decimal(parts[0]) / _decimal(parts[1])
    if kind == "scientific":
        if abs(int(parts[1])) > _MAX_TEN_POWER:
            raise ValueError("power of ten out of range")
        return _decimal(parts[0]) * Fraction(10) ** int(parts[1])
    return _decimal(parts[0].replace(",", ".") if kind == "comma" else parts[0])


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub(r"[,\s+]", "", text))


def same_number(a: Number, b: Number, convert: bool = False) -> bool:
    """Equal in value and not contradicting in unit. 50% is 0.5 and, its sign forgotten, 50; but 0.8 is not 0.8%.

    `convert`: 100 cm is 1 m as well.
    """
    if a.percent != b.percent:
        share, bare = (a, b) if a.percent else (b, a)
        if bare.unit and not bare.unit.startswith("#"):
            return False  # 25% and 25 degrees
        forgotten = abs(bare.value) > 1 and _same_value(a, b, share.value, bare.value)
        return forgotten or _same_value(a, b, share.value / 100, bare.value)
    if same_unit(a.unit, b.unit):
        return _same_value(a, b, a.value, b.value)
    if not convert or "#" in a.unit + b.unit:
        return False
    (x, base_a), (y, base_b) = in_base_units(a.unit), in_base_units(b.unit)
    return base_a == base_b and _same_value(a, b, a.value * x, b.value * y)


def _same_value(a: Number, b: Number, x: Fraction, y: Fraction) -> bool:
    if x == y:
        return True
    if a.integer and b.integer or not (a.rounded or b.rounded):
        return False  # both written out: 16386.20 is not 16386.21, however close
    return abs(x - y) <= _REL_TOLERANCE * max(abs(x), abs(y))


def _read_rest(rest: str, gold: bool) -> tuple[int, bool, str] | None:
    """(multiplier, is percent, unit) from what follows the digits; None if that is not a unit."""
    attached = bool(rest) and not rest[0].isspace()
    rest = rest.strip().rstrip(".").strip("{} " if "^" not in rest else " ")
    factor = 1
    word = re.match(r"([a-z]+)\b\s*|[万萬亿億만억]|[千百](?!米|克|瓦|伏|帕|焦|卡|升|赫)", rest.lower())
    if word and word.group().strip() in _MULTIPLIERS:
        factor, rest = _MULTIPLIERS[word.group().strip()], rest[word.end() :]
    percent = re.match(r"(?:%|percent(?:age)?\b|pct\b|per cent\b)\s*", rest, re.IGNORECASE)
    if percent:
        rest = rest[percent.end() :]
    if not rest:
        return factor, bool(percent), ""
    unit = unit_after(rest, attached, gold)
    return None if unit is None else (factor, bool(percent), unit)


_BASES = {word: value for word, value in _NUMBER_WORDS.items() if 2 <= value <= 16}
_IN_BASE = re.compile(
    r"\(?([0-9][0-9A-Fa-f]*)\)?(?:_\s*\{?\s*\(?(\d{1,2}|[a-z]+)\)?\s*\}?|\s*(?:in\s+)?\(?base[\s-]+(\d{1,2}|[a-z]+)\)?)"
)


_PREFIXED = re.compile(r"0([xXoObB])([0-9A-Fa-f]+)")
_BASE_OF_PREFIX = {"x": 16, "o": 8, "b": 2}


def read_base(text: str) -> tuple[str, int] | None:
    """(digits, base) of "1011_2", "23 base five" or "0b1011"; None for anything else."""
    if prefixed := _PREFIXED.fullmatch(text.strip()):
        return prefixed.group(2).upper().lstrip("0") or "0", _BASE_OF_PREFIX[prefixed.group(1).lower()]
    match = _IN_BASE.fullmatch(text.strip())
    if match is None:
        return None
    base = match.group(2) or match.group(3)
    number = int(base) if base.isdigit() else _BASES.get(base, 0)
    return (match.group(1).upper().lstrip("0") or "0", number) if number else None
