"""What a final answer may say, from the most literal reading to the loosest."""

import re
from collections.abc import Iterator

from apo_lora.rewards.answers.denials import HEDGED, NEGATED, takes_back
from apo_lora.rewards.answers.plain import plain
from apo_lora.rewards.answers.text import MAX_ANSWER_CHARS, FinalAnswer, after_answer_phrase

_IS = re.compile(r"\b(?:is|are|equals?|be|was|were|choose|select|pick)\b")
_SAID_LAST = re.compile(rf"(.*{_IS.pattern})\s*:?\s*(\S.*)$|(.*[a-z]:)\s+(\S.*)$", re.DOTALL)
_SAID_FIRST = re.compile(
    r"(\S.*?)\s+(?:is|are)\s+(?:the\s+|my\s+)?(?:(?:correct|right|final|best|true)\b\s*)?"
    r"(?:answer|option|choice|one|solution|correct|right)?",
    re.DOTALL,
)
_LEAD_IN = re.compile(r"(?:(?:so|thus|hence|therefore|then|clearly|i think|i believe)\b[\s,:]*(?:that\s+)?)+", re.I)
_REASON = re.compile(
    r"\s*[,;(]?\s*\b(?:because|since|as we|due to|given that)\b.*|[,(]\s*(?:and\s+)?not\b.*", re.DOTALL | re.IGNORECASE
)
_PROSE = re.compile(r"[A-Za-z' ,]*[a-z]{2,}[ ,]+(-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?)(?:[ .,][A-Za-z' .,]*)?")
_RELATION = re.compile(r"(?<![<>!\\])=(?!=)|\\approx(?![a-z])")
_AFTER_FORMULA = re.compile(
    r"\W*(?:(?:is|are)\s+(?:the|our|my)\s+(?:\w+\s+)?"
    r"(?:answer|solution|range|result|domain|interval|set|value|condition)s?|holds|works)?\W*"
)
_FORMULA = re.compile(r"\$+([^$]+)\$+|\\[(\[](.+?)\\[)\]]")


def readings(answer: FinalAnswer) -> Iterator[tuple[str, bool]]:
    """(reading, is a bare value) from the most literal to the loosest.

    Looser ones are the end of "the answer is ...", of "... is 5", and of "x = 5"; none is read where the words before
    it take it back ("cannot be 5"). In a tag or a box, text that says such a thing twice or has several sentences is
    read literally only: its end could be one of many tries.
    """
    text = plain(answer.text)
    if len(text) > MAX_ANSWER_CHARS:  # one sign of Unicode may be eighteen once it is made plain
        return
    yield text, False
    phrase = after_answer_phrase(text) if answer.sentence or text.lower().count("answer") < 2 else None
    if phrase:
        yield plain(phrase), False
        text = plain(phrase)
    without_reason = plain(_REASON.sub("", text))
    first = _SAID_FIRST.fullmatch(_LEAD_IN.sub("", without_reason, count=1))
    if first and not takes_back(first.group(1)):
        yield plain(first.group(1)), False
    if without_reason != text:
        yield without_reason, False
    is_one_try = answer.sentence or not (
        HEDGED.search(text) or re.search(r"\n|[.;?!]\s", text) or len(_IS.findall(text)) > 1
    )
    if is_one_try:
        last = _SAID_LAST.fullmatch(text)
        if last and not takes_back(last.group(1) or last.group(3)):
            yield plain(last.group(2) or last.group(4)), False
    value = right_side(without_reason) if is_one_try or without_reason != text else None
    if value and not takes_back(without_reason.rpartition("=")[0]):
        yield value, True
    yield from _one_formula(answer)
    lone = _PROSE.fullmatch(text) if answer.sentence else None
    if lone and not (NEGATED.search(text) or HEDGED.search(text) or takes_back(text[: lone.start(1)])):
        yield lone.group(1), True  # "So he earns 1,080 a month": words and one number


def _one_formula(answer: FinalAnswer) -> Iterator[tuple[str, bool]]:
    """The formula of "Therefore $x \\ge 5$ is the solution": one, among mere words."""
    formulas = list(_FORMULA.finditer(answer.text))
    if len(formulas) != 1:
        return
    before, after = answer.text[: formulas[0].start()], answer.text[formulas[0].end() :]
    is_mere_words = not re.search(r"\d|[\\=<>]", before + after) and not HEDGED.search(before + after)
    is_all = is_mere_words and _AFTER_FORMULA.fullmatch(after)
    if (answer.sentence or is_all) and not takes_back(before) and not NEGATED.search(after):
        yield plain(formulas[0].group(1) or formulas[0].group(2)), True


def right_side(text: str) -> str | None:
    """The value of "x = 5", "AB = 2 + 3 = 5", "x = 1/3 \\approx 0.333" (its exact side)."""
    exact = text.split("\\approx")[0] if re.search(r"\d.*\\approx", text) else text
    pieces = [piece.strip() for piece in _RELATION.split(exact)]
    if len(pieces) < 2 and exact == text or "," in text and text.count("=") > 1:
        return None
    return plain(pieces[-1]) if pieces[-1] and not re.fullmatch(r"[a-zA-Z]", pieces[-1]) else None
