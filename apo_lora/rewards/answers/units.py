"""Units of measurement: names in several scripts, prefixes, compounds; equal ones, and conversion where asked for."""

import re
from fractions import Fraction
from functools import lru_cache

from apo_lora.rewards.answers.denials import BOUNDED, HEDGED, NEGATED

_PREFIXES = {  # symbol: (factor, names)
    "": (1, ("",)),
    "k": (10**3, ("kilo", "千", "キロ", "킬로", "кило")),
    "c": (Fraction(1, 100), ("centi", "厘", "センチ", "센티", "санти")),
    "m": (Fraction(1, 10**3), ("milli", "毫", "ミリ", "밀리", "милли")),
    "d": (Fraction(1, 10), ("deci", "分", "デシ", "데시", "деци")),
    "M": (10**6, ("mega", "兆", "メガ", "메가", "мега")),
    "G": (10**9, ("giga", "吉", "ギガ", "기가", "гига")),
    "u": (Fraction(1, 10**6), ("micro", "微", "マイクロ", "마이크로", "микро")),
    "n": (Fraction(1, 10**9), ("nano", "纳", "ナノ", "나노", "нано")),
    "p": (Fraction(1, 10**12), ("pico", "皮")),
    "h": (100, ("hecto", "百")),
    "T": (10**12, ("tera", "太")),
}
# symbol, then names: they take every prefix.
_METRIC = """
    m meter metre mètre metro метр 米 メートル 미터|g gram gramme gramo грамм 克 グラム 그램
    l L liter litre litro литр 升 リットル 리터|s|N newton 牛 牛顿|J joule 焦 焦耳|W watt 瓦 瓦特|V volt 伏 伏特
    A ampere amp 安 安培|Ω ohm 欧 欧姆|Hz hertz 赫 赫兹|Pa pascal 帕 帕斯卡|eV|F farad|C coulomb 库 库仑|T tesla
    Wb weber|H henry|K kelvin 开|mol mole 摩尔|cal calorie 卡|cd candela|lm lumen
    B byte|bit|bar|dB decibel 分贝"""
# symbol = factor and base, then names. A unit without a factor converts to nothing else.
_OTHERS = """
    min = 60 s, minute minuto minuten минута минут 分钟 分 분
    h = 3600 s, hr hour heure hora stunde stunden час часа часов 小时 时 時間 시간
    day = 86400 s, d jour día tag tage день дней 天 日 일|week = 604800 s, wk semaine semana woche 周 星期 週間
    month, mois mes monat 月 个月|year = 12 month, yr jahr jahre 年 год лет
    s, с sec second seconde segundo sekunde секунда секунд 秒 秒钟 초|in = 0.0254 m, inch 英寸
    ft = 0.3048 m, foot feet 英尺|yd = 0.9144 m, yard|mi = 1609.344 m, mile 英里|lb = 453.59237 g, pound 磅
    oz = 28.349523125 g, ounce|t = 1000000 g, ton tonne тонна 吨 トン 톤|ha = 10000 m^2, hectare 公顷|acre
    gal, gallon|qt, quart|pint|cup|nmi, 海里|knot|inhg|mmhg|atm|mmHg|psi
    ° = 1 °, deg degree degré grado grad градус градуса градусов 度 도 º|′ = 1/60 °, arcmin|rad, radian 弧度
    rev, revolution|turn|°C, celsius degreecelsius °c 摄氏度 ℃|°F, fahrenheit degreefahrenheit °f ℉
    dollar, usd 美元 доллар 달러|cent = 0.01 dollar|euro, eur 欧元|yuan, rmb 元 块 人民币|角 = 0.1 yuan
    rupee, rs inr|yen, jpy 円 엔|ruble, рубль рубля рублей|won, 원|pence, penny|px, pixel|lx, lux|km, 公里 км
    cm, 公分 см|mm, мм|kg, 公斤 кг|ml, мл|m, м 公尺|g, г|am, a.m.|pm, p.m."""
_WHOLE = {  # what is written together, or as several words
    "mph": "mi/h", "kmh": "km/h", "kph": "km/h", "kmph": "km/h", "mps": "m/s", "fps": "ft/s", "cc": "cm^3",
    "sqm": "m^2", "sqft": "ft^2", "Nm": "N m", "kWh": "kW h", "Wh": "W h", "Ah": "A h", "mAh": "mA h", "rpm": "rev/min",
    "degreecelsius": "°C", "degreescelsius": "°C", "degreefahrenheit": "°F", "degreesfahrenheit": "°F",
}  # fmt: skip
# Counters say nothing about a quantity.
_COUNTER_WORDS = """
    unit u time th st nd rd point number total intotal altogether each 个 只 条 本 人 名 次 张 种 件 支 枝 岁 倍 页
    组 棵 辆 位 头 匹 朵 颗 粒 根 把 座 间 家 题 道 套 双 对 箱 袋 瓶 盒 杯 份 層 층 개 명 번 마리 個 枚 匹 冊 台 回
    点 です"""
_COUNTERS = set(_COUNTER_WORDS.split())


def _rows(table: str) -> list[str]:
    return [row.strip() for row in table.strip().replace("\n", "|").split("|")]


def _tables() -> tuple[dict[str, str], dict[str, tuple[Fraction, str]]]:
    """(name or symbol -> canonical symbol, symbol -> factor and what it is a multiple of)."""
    names: dict[str, str] = {}
    sizes: dict[str, tuple[Fraction, str]] = {}
    for row in _rows(_OTHERS):
        head, _, aliases = row.partition(",")
        symbol, _, size = head.partition(" = ")
        if not aliases and not size:
            symbol, _, aliases = head.partition(" ")
        names |= dict.fromkeys([symbol, *aliases.split()], symbol)
        factor, _, base = size.partition(" ")
        if factor:
            sizes[symbol] = Fraction(factor), base
    for prefix, (factor, prefix_names) in _PREFIXES.items():
        for row in _rows(_METRIC):
            symbol, *words = row.split()
            whole = prefix + symbol
            sizes.setdefault(whole, (Fraction(factor), symbol))
            for name in [whole, *(first + word for first in prefix_names for word in words)]:
                names.setdefault(name, whole)
    return names, sizes


_NAMES, _SIZES = _tables()
_LOWER = {name.lower(): symbol for name, symbol in reversed(_NAMES.items())}
_NAME = r"(?:[^\W\d_]|[°′%])+"
_TOKEN = re.compile(rf"\s*(?:([/()])|({_NAME})(?:(?:\s*\^\s*)?\{{?(-?\d)\}}?)?)\s*")
_SPELLINGS = [(re.compile(pattern, re.IGNORECASE), into) for pattern, into in (
    (r"\\(?:cdot|times)|[·⋅*]|(?<=\w)-(?=[a-z])", " "),
    (r"\bper\b|每", "/"),
    (r"^个(?=.)", ""),
    (r"\\Omega", "Ω"),
    (r"\\|\.$", ""),
    (r"\s+squared?\b", "^2"),
    (r"\s+cubed\b", "^3"),
    (rf"(?:\b(?:square|sq|кв)\b\.?\s*|平方|제곱)({_NAME})", r"\1^2"),
    (rf"(?:\b(?:cubic|cu|куб)\b\.?\s*|立方|세제곱)({_NAME})", r"\1^3"),
)]  # fmt: skip


@lru_cache(maxsize=4096)
def parse_unit(text: str) -> str | None:
    """Canonical unit, as "m s^-2"; "" for a mere counter ("units"); None where it is no known unit."""
    together = re.sub(r"\s", "", text)
    if together.lower() in _COUNTERS or together.lower().removesuffix("s") in _COUNTERS:
        return ""
    if (one := _symbol(together.replace(".", ""))) and "." in together:
        return one  # "a.m.", "in."
    text = _WHOLE.get(together) or _WHOLE.get(together.lower(), text)
    for pattern, into in _SPELLINGS:
        text = pattern.sub(into, text.strip())
    powers: dict[str, int] = {}
    sign = group = 1
    at = 0
    for token in _TOKEN.finditer(text):
        if token.start() != at:
            return None
        at = token.end()
        mark, word, power = token.groups()
        if mark == "/":
            sign = -group
        elif mark:
            sign = group = sign if mark == "(" else 1
        elif word in _COUNTERS or word.removesuffix("s") in _COUNTERS:
            continue
        elif (unit := _symbol(word)) is None:
            return None
        else:
            powers[unit] = powers.get(unit, 0) + sign * int(power or 1)
    if at != len(text) or not at or text.count("(") != text.count(")"):
        return None
    return " ".join(unit + (f"^{power}" if power != 1 else "") for unit, power in sorted(powers.items()) if power)


def _symbol(name: str) -> str | None:
    """The canonical symbol for a name, in its own case before any other, in the singular or plural."""
    for table, form in ((_NAMES, name), (_LOWER, name.lower() if len(name) > 1 else "")):
        for single in (form, form.removesuffix("s"), form.removesuffix("es")):
            if single in table:
                return table[single]
    return None


def _spelled(unit: str) -> list[tuple[str, int]]:
    """The factors of a canonical unit: "m s^-2" to [("m", 1), ("s", -2)]."""
    return [(name, int(power or 1)) for name, _, power in (factor.partition("^") for factor in unit.split())]


def same_unit(a: str, b: str) -> bool:
    """A missing unit never contradicts; two known units must be the same; other words must overlap."""
    if not a or not b or a == b:
        return True
    if a.startswith("#") and b.startswith("#"):
        return bool(set(a[1:].split()) <= set(b[1:].split()) or set(b[1:].split()) <= set(a[1:].split()))
    return False


def in_base_units(unit: str) -> tuple[Fraction, str]:
    """How many of which base units one `unit` is: "km h^-1" to (5/18, "m s^-1"). Unknown ones are their own base."""
    factor, powers = Fraction(1), {}
    todo = _spelled(unit)
    while todo:
        name, power = todo.pop()
        size, base = _SIZES.get(name, (Fraction(1), name))
        factor *= size**power
        if base == name:
            powers[name] = powers.get(name, 0) + power
        else:
            todo += [(part, power * part_power) for part, part_power in _spelled(base)]
    return factor, " ".join(f"{name}^{power}" for name, power in sorted(powers.items()) if power)


# --- after a number --------------------------------------------------------------------------------------------------

_SMALL_LETTERS = "msghl"  # "5m" is a length in an answer; "5n" and "5x" are algebra
_LARGE_LETTERS = "NVWJAΩL"  # of either side: "12N" is a force
# Words after a number that change its value or say that there is more than one answer.
_NO_UNIT_WORDS = """
    or and not to if than but over plus minus divided is are was equals half halves third thirds quarter quarters
    fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth
    hundredths thousandths squared cubed factorial pi root modulo mod sin cos tan log ln sqrt frac base isn would could
    might may must should most least less more fewer maximum minimum max exceeds upper lower bound limit"""
_NO_UNIT = set(_NO_UNIT_WORDS.split())
_CHANGES_VALUE = re.compile(
    r"[半多余餘几]|分之|multiplied|times (?:the|as|its)\b|以上|以下|以内|未満|より|を超え|以外|之外|초과|미만|이상|이하"
)


def unit_after(rest: str, attached: bool, gold: bool) -> str | None:
    """Canonical unit after a number: as `parse_unit`, or "#..." for other words; None where it is not a unit.

    `attached`: no space between. `gold`: "3m" in a gold answer is algebra, in an answer it is three metres.
    """
    if attached and len(rest) == 1 and rest.isascii() and rest.isalpha():
        letters = _LARGE_LETTERS if gold else _LARGE_LETTERS + _SMALL_LETTERS
        return parse_unit(rest) if rest in letters else None
    bare = re.sub(r"[{}]", "", rest) if "^" not in rest else rest
    for spelling in (bare, re.sub(r"\b([a-z]) (?=[a-z]\b)", r"\1", bare)):  # "c m^2", set letter by letter
        if (known := parse_unit(spelling)) is not None:
            return known
    if NEGATED.search(rest) or BOUNDED.search(rest) or HEDGED.search(rest) or _CHANGES_VALUE.search(rest):
        return None
    if re.fullmatch(r"[^\W\d_]{1,10}", rest) and rest[0] > "\u024f":  # no Latin letter, accents included
        return "#" + rest
    for count in (2, 1):  # "5 cm long", "5 m/s north", "5 square inches of card"
        head, tail = " ".join(rest.split()[:count]), rest.split()[count:]
        if tail and all(word.isalpha() and word not in _NO_UNIT for word in tail[:9]) and parse_unit(head) is not None:
            return parse_unit(head)
    words = re.sub(r"[^a-z\s]", " " if re.fullmatch(r"[A-Za-z\s',.()-]+", rest) else "0", rest.lower()).split()
    if not 1 <= len(words) <= 10 or any(not w.isalpha() or w in _NO_UNIT for w in words):
        return None
    shortest = 4 if attached else 3
    if len(words[0]) < shortest and words[0] not in ("of", "in", "on", "at"):
        return None
    return "#" + " ".join(word.rstrip("s") for word in words)


def strip_unit(text: str) -> str:
    """`text` without a known unit at its end: "6\\sqrt{2} cm" to "6\\sqrt{2}". Degree signs go too."""
    match = re.fullmatch(r"(.*?(?:[\d})!]|\\pi))(\s*)((?!\\pi)[^\W\d_\\].*|\\Omega)", text)
    if match:
        number, space, unit = match.groups()
        is_apart = space or len(unit) > 1 or not unit.isascii()
        if is_apart and unit.count("{") == unit.count("}") and parse_unit(unit) is not None:
            text = number
    return re.sub(r"(?<![a-z]\{)°", "", text).strip()
