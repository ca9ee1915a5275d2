"""Text made plain: one sign for each meaning, no markup, mathematics kept; and keys for "written the same"."""

import re
import unicodedata
from functools import lru_cache

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ",
    "∠": r"\angle ", "∪": r"\cup ", "∩": r"\cap ", "°": "°", "º": "°", "˚": "°", "θ": r"\theta ", "。": ". ",
    "、": ", ", "【": "(", "】": ")", "“": '"', "”": '"', "‘": "'", "’": "'", "⁄": "/", "「": '"', "」": '"',
    "∥": r"\parallel ", "⊥": r"\perp ",
    "△": r"\triangle ", "≅": r"\cong ", "≌": r"\cong ", "∽": r"\sim ", "∼": r"\sim ", "∅": r"\emptyset ", "∈": r"\in ",
    "⊙": r"\odot ", "∴": "", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ",
    "ω": r"\omega ", "ρ": r"\rho ", "σ": r"\sigma ", "٫": ".", "٬": ",",
}  # fmt: skip
_ROOTS = {"√": "sqrt", "∛": "sqrt[3]", "∜": "sqrt[4]"}
_SIGN_TABLE = str.maketrans(_SIGNS)
# Soft hyphens, joiners, direction marks. Not the overrides U+202D and U+202E: those change what a reader sees.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202c\u2060-\u2064\u2066-\u2069\ufeff]")
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # no honest text holds these: never equal


def unify_signs(text: str) -> str:
    """One sign for each meaning: any script's digits to ASCII, "²" to "^2", "½" to " 1/2", "√3" to "\\sqrt{3}"."""
    text = _BROKEN.sub("\ufffd", text)
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^" + m.group().translate(_SUPERSCRIPTS), text)
    text = re.sub("[¼½¾⅐-⅞]", lambda m: " " + m.group(), text)  # NFKC alone makes "2½" read 21/2
    for sign, command in _ROOTS.items():
        text = re.sub(rf"{sign}\s*(?:(\d+(?:\.\d+)?|[a-z]\b)|\(([^()]*)\))", rf"\\{command}{{\1\2}}", text)
        text = text.replace(sign, f"\\{command}")
    text = unicodedata.normalize("NFKC", text.replace("º", "°").replace("˚", "°"))
    text = re.sub(r"[^\W0-9]", lambda m: str(unicodedata.decimal(m.group(), m.group())), text)
    return _INVISIBLE.sub("", text.translate(_SIGN_TABLE))


_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|normal|normalfont)?|math(?:rm|bf|it|sf|tt|bb|normal)|mbox|hbox|emph|underline|"
    r"operatorname\*?|boldsymbol|bm|boxed|fbox|number|num|unit|si)\s*\{([^{}]*)\}"
)
_ARGUMENT = r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
_ROW = "\x7f"  # ends the row of a matrix; _BROKEN keeps it out of what others write
_BARE_FUNCTIONS = r"(sin|cos|tan|cot|arcsin|arccos|arctan|ln|log|lg|exp(?=\()|sec(?=\()|csc(?=\())"
_REWRITES = [(re.compile(pattern), into) for pattern, into in (
    (r"\\!\s*|\\displaystyle|\\textstyle|\\(?:big|Big|bigg|Bigg)[lr]?(?![a-zA-Z])|\\(?:rm|bf|it)(?![a-zA-Z])", ""),
    (r"\\(?:left|right)(?![a-zA-Z])\.?", ""),
    (rf"\\(?:quantity|qty|SI){_ARGUMENT}{_ARGUMENT}", r"\1 \2"),
    (rf"\\ang{_ARGUMENT}", r"\1°"),
    (r"\\[()\[\]]|\$", " "),
    (r"\\([%&#_])", r"\1"),
    (r"\\[,;:>\s]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"\{\s*,\s*\}", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"(?:\{\s*\})?\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![a-zA-Z]))|\\degree(?![a-zA-Z])", "°"),
    (r"\\(?:leq|leqslant)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:geq|geqslant)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:overrightarrow|vec)\s*\{?\s*([a-zA-Z]{1,2})(?![a-zA-Z])\s*\}?", r"\\vec{\1}"),
    (r"\\(?:vartriangle|bigtriangleup)(?![a-zA-Z])", r"\\triangle "),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
    (r"(?<=[A-Z])\s*(?://|\|\|)\s*(?=[A-Z])", r" \\parallel "),
    (r"(?<![\\a-zA-Z])sqrt\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+))", r"\\sqrt{\1\2\3}"),
    (rf"(?<![\\a-zA-Z]){_BARE_FUNCTIONS}(?=\s*(?:[(\\\d^_]|[a-z]\b))", r"\\\1"),
    (r"\\log\s*_\s*(?:\{([^{}]+)\}|(\w))", r"\\log_{\1\2}"),
    (r"\\lg(?![a-zA-Z])", r"\\log_{10}"),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<=[\d)}])\*\*(?=[\d({-])", "^"),  # a power, not bold type
    (r"\*\*|__|`|^#{1,3}\s+", ""),
    (r"(\^\s*(?:\{\s*-?\d+\s*\}|\d+(?=\s)))\s*(?=\d)", r"\1 \\cdot "),  # 2^6 3^5
    (r"\^\s*\{\s*(\d)\s*\}", r"^\1"),
    (r"(?<![\w\\}\]^])\{\s*([\w.°]+)\s*\}", r"\1"),  # a group that is no command's argument
    (r"(?<![\w\\}\]^])\{\s*([\w.°]+(?:\^\w)?)\s*\}(?!\s*\^)", r"\1"),
    (r"(?<=\d)\s*(?:[aA]\.[mM]\.?|AM)(?![a-zA-Z])", " am"),
    (r"(?<=\d)\s*(?:[pP]\.[mM]\.?|PM)(?![a-zA-Z])", " pm"),
    (rf"{_ROW}\s*(?=\\end)", ""),
    (r"[\[(]\s*\\begin\s*\{(?:array|matrix)\}(?:\s*\{[^{}]*\})?([^()\[\]]*?)\\end\s*\{(?:array|matrix)\}\s*[\])]",
     r"\\begin{pmatrix}\1\\end{pmatrix}"),
    (r"\\(begin|end)\s*\{(?:b|small)?matrix\}", r"\\\1{pmatrix}"),
    (r"\s+", " "),
)]  # fmt: skip
_EDGES = " \t\r\n\"'`*;,"


@lru_cache(maxsize=1024)
def plain(text: str) -> str:
    """`text` without its markup: no $, no \\text{}, no markdown, no closing full stop; mathematics kept."""
    text = unify_signs(text)
    for _ in range(6):  # wrappers nest: \boxed{\textbf{(C)}}
        unwrapped = _WRAPPER.sub(r" \1 ", text)
        if unwrapped == text:
            break
        text = unwrapped
    if "\\begin" in text:
        text = re.sub(r"\\\\(?![a-z]{2})\s*", _ROW, text)
    text = text.replace("\\\\", "\\")  # a completion that was JSON-escaped once too often
    for pattern, into in _REWRITES:
        text = pattern.sub(into, text)
    return _trim(text).replace(_ROW, r"\\ ")


_COPULA_AT_END = re.compile(r"(?<=\S)\s*(?:です|でした|である|だ|입니다|이다|है)$")


def _trim(text: str) -> str:
    before = None
    while text != before:
        before = text
        text = text.strip(_EDGES)
        if re.search(r"[^.]\.{1,2}$|[^\d)!]!$|\?$|:$", text) and not re.fullmatch(r"[?!.:]+", text):
            text = text[:-1]
        text = _COPULA_AT_END.sub("", text)
        if len(text) > 2 and text.startswith("{") and text.endswith("}") and "{" not in text[1:] and "," not in text:
            text = text[1:-1]
    return text


def compact(text: str) -> str:
    """A key for "written the same": without spaces (but "5 6" is not "56") and without braces round single signs."""
    key = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"(\\[a-zA-Z]+)\s*(?![a-zA-Z\s])", r"\1", text))
    return key if "\\frac" in key else re.sub(r"\{(\w)\}", r"\1", key)


_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)")
_SPELLINGS = (("grey", "gray"), ("colour", "color"), ("centre", "center"), ("metre", "meter"), ("litre", "liter"))


def word_key(text: str) -> str:
    """A key for plain words: case, leading article, hyphen, quotes and British spelling do not matter."""
    key = re.sub(r"[-_\s\"',.!?;:]+", " ", _ARTICLE.sub("", text.casefold().strip())).strip()
    for british, american in _SPELLINGS:
        key = key.replace(british, american)
    return re.sub(r"^(.+) color$|^color (.+)$", lambda m: m.group(1) or m.group(2), key)
