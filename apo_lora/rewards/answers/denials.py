"""Words that take an answer back: negations, hedges, conditions and bounds, in the languages that models answer in."""

import re

_NEGATIONS = r"""
    not|no|none|neither|nor|never|except|wrong|incorrect|eliminate[sd]?|unlike|unlikely|false|cannot|ruled?s? out|
    impossible|invalid|doubt\w*|reject\w*|exclud\w*|rather than|instead of|other than|different from|anything but|
    far from|nicht|keine?[nrms]?|pas|jamais|non|não|nao|нет|не|nie|niet|geen"""
_BOUNDS = r"""
    at most|at least|than|up to|under|over|below|above|beyond|exceed(?:s|ing)?|surpass(?:es)?|almost|nearly|
    close to|bounded by|might be|could be|may be|unless it is|if it (?:is|were|was)|(?:maximum|minimum|limit) of|within|
    until|before|after|between|au plus|au moins|höchstens|
    mindestens|como máximo|al menos|más de|menos de|plus de|moins de|не более|не менее|больше|меньше"""
_BOUNDS_UNSPACED = "最多|至多|至少|大于|小于|超过|不到|少于|多于|최대|최소"


def _alternatives(table: str) -> str:
    return "|".join(word.strip() for word in table.split("|"))


NEGATED = re.compile(rf"\b(?:{_alternatives(_NEGATIONS)})\b|n't\b|[不没沒非無错錯]|ない|ません|아니|않", re.IGNORECASE)
HEDGED = re.compile(
    r"(?<![a-zA-Z])(?:or|either|maybe|perhaps|possibly|oder|ou)(?![a-zA-Z])|或|または|또는", re.IGNORECASE
)
# Right before a value, they make it a bound or a guess.
BOUNDED = re.compile(
    rf"(?:\b(?:{_alternatives(_BOUNDS)})|{_BOUNDS_UNSPACED})\s*(?:about|just|the|an?|only)?\s*$", re.IGNORECASE
)
_CLAUSE = re.compile(r"[,;:.]\s|\b(?:which|but|so|thus|hence|therefore|then|because|since)\b", re.IGNORECASE)


def takes_back(before: str) -> bool:
    """Whether the words right before a value deny it or make it a bound: "cannot be", "at most"."""
    clause = _CLAUSE.split(before)[-1]
    return bool(NEGATED.search(clause) or BOUNDED.search(clause))
