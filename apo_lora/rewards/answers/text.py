"""From a model's whole completion to the short text of its final answer, and that text made plain.

`final_answer` picks the text; `plain` strips its markup (markdown, LaTeX wrappers, full-width signs) but
keeps its mathematics. Nothing here judges an answer, and nothing is slow on a megabyte of rubbish.
"""

import re
import unicodedata
from dataclasses import dataclass

MAX_ANSWER_CHARS = 1000  # a longer "answer" is an essay or an attack: it earns 0
_TAIL_CHARS = 2000  # without a tag or a box, only the end of a completion is read
_BOX_SCAN_CHARS = 2 * MAX_ANSWER_CHARS
_MAX_JOINED_BOXES = 50  # a megabyte of boxes side by side would take half a minute


@dataclass(frozen=True)
class FinalAnswer:
    """`text` of the answer; `sentence` is True where it was cut from prose rather than from a tag or a box."""

    text: str
    sentence: bool


_END_TOKENS = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|end)\|>|</s>|<eos>|<end_of_turn>")
# "the answer is", "correct option:", "####" (GSM8K), and the Chinese forms; the last one in the text counts.
_ANSWER_PHRASE = re.compile(
    r"(?:\b(?:answer|option|choice|solution|result)\b(?:\s+(?:to|of|for)\b[^.\n:]{0,60}?)?"
    r"(?:\s+(?:is|are|must\s+be|should\s+be|would\s+be)\b|\s*[:=])|答案(?:是|为|:)|正确选项(?:是|为|:)|选项(?:是|为)|[故应]选|####"
    r"|(?:^|\n)\s*(?:final\s+)?answer(?=\s))(?:\s*therefore\b|\s*thus\b)?\s*[:,]?\s*",
    re.IGNORECASE,
)
_PLEASANTRY = re.compile(r"\bI hope (?:it|this|that) (?:is|helps)\b.*", re.IGNORECASE | re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[^\d\s])[.!?](?=\s+[A-Z$\\(])|(?<=\d)[.!?](?=\s+[A-Z][a-z])|。|\n")


def final_answer(completion: str) -> FinalAnswer | None:
    """The final answer: last <answer>, else last \\boxed{}, else "answer is ...", else the last line.

    What stands before the last </think> is reasoning and is never read. None where there is no answer,
    or where it is longer than MAX_ANSWER_CHARS.
    """
    said = completion.rsplit("</think>", 1)[-1]
    start = said.rfind("<answer>")
    if start >= 0:
        # A missing closing tag means that generation ended there: the format reward, not this one, minds.
        inside = said[start + len("<answer>") :].split("</answer>", 1)[0]
        if len(inside) > MAX_ANSWER_CHARS:
            return None
        return _wrap(last_box(inside) or _END_TOKENS.split(inside, maxsplit=1)[0], sentence=False)
    if "\\boxed" in said or "\\fbox" in said:
        return _wrap(last_box(said), sentence=False)
    return _wrap(_from_prose(said[-_TAIL_CHARS:]), sentence=True)


def _wrap(text: str | None, sentence: bool) -> FinalAnswer | None:
    if text is None or not text.strip() or len(text) > MAX_ANSWER_CHARS:
        return None
    return FinalAnswer(text.strip(), sentence)


def _from_prose(tail: str) -> str | None:
    tail = _END_TOKENS.split(tail, maxsplit=1)[0]
    tail = _PLEASANTRY.sub("", unify_signs(tail).replace("**", "").replace("__", ""))
    lines = [line for line in tail.splitlines() if line.strip()]
    if not lines:
        return None
    return after_answer_phrase("\n".join(lines)) or _last_sentence(lines[-1])


def _last_sentence(line: str) -> str:
    pieces = [p for p in _SENTENCE_END.split(line) if p and p.strip()]
    return pieces[-1] if pieces else ""


def after_answer_phrase(text: str) -> str | None:
    """What follows the last "answer is" (or the like), to the end of its sentence; None without one."""
    found = list(_ANSWER_PHRASE.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :].lstrip()
    return _SENTENCE_END.split(rest, maxsplit=1)[0].strip() or None


def last_box(text: str) -> str | None:
    """The content of the last \\boxed{}; boxes that stand side by side are joined as they were joined there.

    "\\boxed{1} and \\boxed{2}" is one answer of two parts, and "\\boxed{A} or \\boxed{B}" is a hedge that must be
    seen as one; hence the joining. A box that never closes was cut off and is not an answer.
    """
    found = _one_box(text, len(text))
    if found is None:
        return None
    start, _, content = found
    for _ in range(_MAX_JOINED_BOXES):
        before = _one_box(text, start)
        if before is None:
            return content.strip()
        between = text[before[1] : start]
        joint = re.sub(r"\\(?:text|quad|qquad|ldots|textbf)\b|[\s$\\{}()\[\]~;]", "", between).lower()
        if len(between) > 40 or joint not in ("", ",", "and", "or", ",and", ",or", "/", "或", "和"):
            return content.strip()
        if before[2].strip() != content.strip():
            word = " or " if "or" in joint or joint in ("/", "或") else ", "
            content = before[2].strip() + word + content.strip()
        start = before[0]
        if len(content) > MAX_ANSWER_CHARS:
            break
    return content


def _one_box(text: str, end: int) -> tuple[int, int, str] | None:
    """(start, end, content) of the last box that opens before `end`."""
    start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
    if start < 0:
        return None
    opening = re.compile(r"\\(?:boxed|fbox)\s*").match(text, start).end()
    if text[opening : opening + 1] != "{":
        bare = re.compile(r"[^\s$\\.,]+").match(text, opening)  # \boxed 5
        return (start, bare.end(), bare.group()) if bare else None
    depth = 0
    for position in range(opening, min(len(text), opening + _BOX_SCAN_CHARS)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return start, position + 1, text[opening + 1 : position]
    return None


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ",
    "∠": r"\angle ", "∪": r"\cup ", "∩": r"\cap ", "°": "°", "º": "°", "˚": "°", "θ": r"\theta ", "。": ". ",
    "、": ", ", "【": "(", "】": ")", "“": '"', "”": '"', "‘": "'", "’": "'", "⁄": "/",
}  # fmt: skip
_SIGN_TABLE = str.maketrans(_SIGNS)
# Soft hyphens, joiners, direction marks. Not the overrides U+202D and U+202E: those change what a reader sees.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202c\u2060-\u2064\u2066-\u2069\ufeff]")
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # no honest text holds these: never equal


def unify_signs(text: str) -> str:
    """One sign for each meaning: full-width to ASCII, "²" to "^2", "½" to " 1/2", "√3" to "\\sqrt{3}"."""
    text = _BROKEN.sub("\ufffd", text)
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^" + m.group().translate(_SUPERSCRIPTS), text)
    text = re.sub("[¼½¾⅐-⅞]", lambda m: " " + m.group(), text)  # NFKC alone makes "2½" read 21/2
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[a-z]\b|\([^()]*\))", lambda m: f"\\sqrt{{{m.group(1).strip('()')}}}", text)
    text = unicodedata.normalize("NFKC", text.replace("º", "°").replace("˚", "°"))
    return _INVISIBLE.sub("", text.translate(_SIGN_TABLE))


_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|normal|normalfont)?|math(?:rm|bf|it|sf|tt|bb|normal)|mbox|hbox|emph|underline|"
    r"operatorname\*?|boldsymbol|bm|boxed|fbox)\s*\{([^{}]*)\}"
)
_REWRITES = [(re.compile(pattern), into) for pattern, into in (
    (r"\\!\s*|\\displaystyle|\\textstyle|\\(?:big|Big|bigg|Bigg)[lr]?(?![a-zA-Z])", ""),
    (r"\\(?:left|right)(?![a-zA-Z])\.?", ""),
    (r"\\[()\[\]]|\$", " "),
    (r"\\([%&#_])", r"\1"),
    (r"\\[,;:>\s]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"\{\s*,\s*\}", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\{?\s*\}?\^\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?|\\degree(?![a-zA-Z])", "°"),
    (r"\\(?:leq|leqslant)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:geq|geqslant)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
    (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<=[\d)}])\*\*(?=[\d({-])", "^"),  # a power, not bold type
    (r"\*\*|__|`|^#{1,3}\s+", ""),
    (r"\^\s*\{\s*(\d)\s*\}", r"^\1"),
    (r"\s+", " "),
)]  # fmt: skip
_EDGES = " \t\r\n\"'`*;,"


def plain(text: str) -> str:
    """`text` without its markup: no $, no \\text{}, no markdown, no closing full stop; mathematics kept."""
    text = unify_signs(text)
    for _ in range(6):  # wrappers nest: \boxed{\textbf{(C)}}
        unwrapped = _WRAPPER.sub(r" \1 ", text)
        if unwrapped == text:
            break
        text = unwrapped
    if "\\begin" not in text:  # a completion that was JSON-escaped once too often; in a matrix "\\\\" ends a row
        text = text.replace("\\\\", "\\")
    for pattern, into in _REWRITES:
        text = pattern.sub(into, text)
    return _trim(text)


def _trim(text: str) -> str:
    before = None
    while text != before:
        before = text
        text = text.strip(_EDGES)
        if re.search(r"[^.]\.$|[^\d)!]!$|\?$|:$", text) and not re.fullmatch(r"[?!.:]+", text):
            text = text[:-1]
        if text.startswith("{") and text.endswith("}") and "{" not in text[1:] and "," not in text:
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
    key = re.sub(r"[-_\s\"',.!?;:]+", " ", text.casefold()).strip()
    for british, american in _SPELLINGS:
        key = key.replace(british, american)
    key = _ARTICLE.sub("", key)
    return re.sub(r"^(.+) color$|^color (.+)$", lambda m: m.group(1) or m.group(2), key)
