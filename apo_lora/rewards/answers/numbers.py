"""Reading a number out of plain text, exactly: digits, fractions, mixed numbers, percent, money, units."""

import re
from dataclasses import dataclass
from fractions import Fraction

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
    seventeen eighteen nineteen twenty"""
_NUMBER_WORDS = {word: value for value, word in enumerate(_COUNTING.split())}
_MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_LEAD = re.compile(
    r"^(?:about|approximately|approx\.?|roughly|around|exactly|only|\\approx|~|=|:|rs\.?|usd|us)\s*", re.IGNORECASE
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
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    word = re.match(r"([a-z]+)\b", text.lower())
    if word and word.group(1) in _NUMBER_WORDS:
        text = str(_NUMBER_WORDS[word.group(1)]) + text[word.end() :]
    sign = re.match(r"[-+]?\s*", text).group()
    body = text[len(sign) :]
    for kind, pattern in _READERS:
        match = pattern.match(body)
        if match and len(match.group()) <= 2 * _MAX_DIGITS and not _DIGITS_GO_ON.match(body, match.end()):
            return _read(kind, match, -1 if "-" in sign else 1, body[match.end() :], gold)
    return None


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


def same_number(a: Number, b: Number) -> bool:
    """Equal in value and not contradicting in unit. Percent: 50% = 0.5, and the sign itself may be missing."""
    if not same_unit(a.unit, b.unit):
        return False
    if a.percent == b.percent or _same_value(a, b, a.value, b.value):
        return _same_value(a, b, a.value, b.value)
    return _same_value(a, b, a.value / 100 if a.percent else a.value, b.value / 100 if b.percent else b.value)


def _same_value(a: Number, b: Number, x: Fraction, y: Fraction) -> bool:
    if x == y:
        return True
    if a.integer and b.integer or not (a.rounded or b.rounded):
        return False  # both written out: 16386.20 is not 16386.21, however close
    return abs(x - y) <= _REL_TOLERANCE * max(abs(x), abs(y))


_UNIT_TABLE = """cm centimeter centimetre|mm millimeter millimetre|m meter metre|km kilometer kilometre|dm decimeter
in inch inches|ft foot feet|yd yard|mi mile|g gram|kg kilogram|mg milligram|lb lbs pound|oz ounce|ton tonne
s sec second|min minute|h hr hour|day|week|month|yr year|l liter litre|ml milliliter millilitre|deg degree °
rad radian|dollar|euro|cent|yuan|rupee rs|mph mi/h mileperhour mileanhour|km/h kmh kph kmph kilometerperhour
m/s mps meterpersecond|n newton|j joule|w watt|v volt|a amp ampere|ohm|hz hertz|pa pascal|k kelvin
celsius °c c degreecelsius|fahrenheit °f f degreefahrenheit|mol mole""".replace("\n", "|")
_UNITS = {alias: row.split()[0] for row in _UNIT_TABLE.split("|") for alias in row.split()}
_LETTER_UNITS = "msghl"  # "5m" is a length in an answer; "5n" and "5x" are algebra
_NOTHING = {"unit", "u", "time", "th", "st", "nd", "rd", "point", "number", "total", "intotal", "altogether", "each"}
_POWER_WORDS = (("square", "2"), ("sq", "2"), ("cubic", "3"), ("cu", "3"))
# Words after a number that change its value or say that there is more than one answer.
_NO_UNIT_WORDS = """
    or and not to if than but over plus minus divided is are was equals half halves third thirds quarter quarters
    fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth
    hundredths thousandths squared cubed factorial pi root modulo mod sin cos tan log ln sqrt frac either maybe
    isn neither nor unless except instead wrong incorrect"""
_NO_UNIT = set(_NO_UNIT_WORDS.split())


def _read_rest(rest: str, gold: bool) -> tuple[int, bool, str] | None:
    """(multiplier, is percent, unit) from what follows the digits; None if that is not a unit."""
    attached = bool(rest) and not rest[0].isspace()
    rest = rest.strip().rstrip(".").strip("{} ")
    factor = 1
    word = re.match(r"([a-z]+)\b\s*", rest.lower())
    if word and word.group(1) in _MULTIPLIERS:
        factor, rest = _MULTIPLIERS[word.group(1)], rest[word.end() :]
    percent = re.match(r"(?:%|percent(?:age)?\b|pct\b|per cent\b)\s*", rest, re.IGNORECASE)
    if percent:
        rest = rest[percent.end() :]
    if not rest:
        return factor, bool(percent), ""
    if attached and len(rest) == 1 and rest.isalpha() and (gold or rest.lower() not in _LETTER_UNITS):
        return None
    unit = _unit(rest)
    return None if unit is None else (factor, bool(percent), unit)


def _unit(text: str) -> str | None:
    """Canonical unit: a known one ("cm^2"), "" for a mere counter ("units"), "#..." for other words, None for none."""
    known = _known_unit(re.sub(r"[{}\s.\\]", "", text).lower())
    if known is not None:
        return known
    words = re.sub(r"[^a-z\s]", " " if re.fullmatch(r"[A-Za-z\s',.()-]+", text) else "0", text.lower()).split()
    if not 1 <= len(words) <= 10 or any(not w.isalpha() or w in _NO_UNIT for w in words):
        return None
    first = _known_unit(words[0])
    if first is not None and len(words) > 1:
        return first  # "5 cm long"
    if len(words) > 1 and words[0] in ("square", "cubic", "sq") and _known_unit("".join(words[:2])) is not None:
        return _known_unit("".join(words[:2]))
    if len(words[0]) < 3 and words[0] not in ("of", "in", "on", "at"):
        return None
    return "#" + " ".join(word.rstrip("s") for word in words)


def _known_unit(key: str) -> str | None:
    if key in ("am", "pm"):
        return key
    power = re.search(r"\^?([23])$", key)
    power_text = power.group(1) if power else ""
    name = key[: power.start()] if power else key
    for word, digit in _POWER_WORDS:
        if name.startswith(word) and len(name) > len(word):
            name, power_text = name[len(word) :], digit
    for candidate in (name, name.removesuffix("s"), name.removesuffix("es"), name.replace("sper", "per")):
        if candidate in _NOTHING:
            return ""
        if candidate in _UNITS:
            return _UNITS[candidate] + ("^" + power_text if power_text else "")
    return None


def same_unit(a: str, b: str) -> bool:
    """A missing unit never contradicts; two known units must be the same; other words must overlap."""
    if not a or not b or a == b:
        return True
    if a.startswith("#") and b.startswith("#"):
        return bool(set(a[1:].split()) <= set(b[1:].split()) or set(b[1:].split()) <= set(a[1:].split()))
    return False


def strip_unit(text: str) -> str:
    """`text` without a known unit at its end: "6\\sqrt{2} cm" to "6\\sqrt{2}". Degree signs go too."""
    match = re.fullmatch(r"(.*?[\d})!]|.*?\\pi)(\s+)([a-zA-Z][a-zA-Z/ ]*(?:\^\{?[23]\}?)?)", text)
    if match and _known_unit(re.sub(r"[{}\s]", "", match.group(3)).lower()) is not None:
        text = match.group(1)
    return text.replace("°", "").strip()
