"""Accuracy that allows a number to be a little off, as questions about charts are scored (ChartQA, arXiv 2203.10244).

ChartQA allows 5 %. That is generous to years: 2015 is within 5 % of 2010, there as here.
"""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction

from apo_lora.rewards.answers.gold import describes_number, read_gold
from apo_lora.rewards.answers.match import judge
from apo_lora.rewards.answers.plain import plain
from apo_lora.rewards.answers.text import final_answer

_NUMERAL = re.compile(r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,30})(?:\.\d{1,30})?(?![\d])")
_MOST_NUMERALS = 8  # an answer with more is not one number


def nearly_equal(completion: str, answer: str, tolerance: float) -> bool:
    """Whether the final answer is a number within `tolerance` (relative, 0.05 is 5 %) of the gold `answer`'s.

    The verifier itself reads the answer: a number near the gold one is put into the gold answer's place, with its unit,
    and the completion must match that. So hedges, units and percent signs count exactly as in `accuracy`.
    """
    found = final_answer(completion)
    if found is None:
        return False
    text = plain(found.text)
    numerals = _NUMERAL.findall(text)
    if len(numerals) > _MOST_NUMERALS:
        return False
    values = {Fraction(numeral.replace(",", "")) for numeral in numerals}
    if (whole := describes_number(text)) is not None:  # a fraction, a power of ten, a number in words
        values.add(whole.value)
    for value in values:
        for factor in (1, 100, Fraction(1, 100)):  # 41 % and 0.41
            for target, before, after in _places(answer):
                if abs(value * factor - target) <= Fraction(tolerance) * abs(target):
                    gold = read_gold(f"{before}{_written(value * factor)}{after}", ())
                    if gold is not None and judge(found, gold) is True:
                        return True
    return False


def _places(answer: str) -> Iterator[tuple[Fraction, str, str]]:
    """(number, text before it, text after it) of a gold answer that is a number, as written and as it counts."""
    gold = read_gold(answer, ())
    number = None if gold is None else describes_number(gold.text)
    if number is None:
        return
    found = list(_NUMERAL.finditer(gold.text))
    if len(found) == 1:
        (match,) = found
        yield Fraction(match.group().replace(",", "")), gold.text[: match.start()], gold.text[match.end() :]
    if not number.unit and not number.percent:
        yield number.value, "", ""  # 1.2 million is 1,200,000


def _written(value: Fraction) -> str:
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    return format(decimal, "f") if Fraction(decimal) == value else str(value)


def relaxed_tries(answer: str, choices: Sequence[str] | None, tolerance: float) -> Iterator[tuple[str, float, str]]:
    """(what it is, its right reward, final answer), for the check of rewards."""
    yield "unchanged", 1.0, answer
    target, before, after = next(_places(answer), (Fraction(0), "", ""))
    if target and tolerance and not choices:
        for times, expected in ((Fraction(4, 5), 1.0), (Fraction(6, 5), 0.0)):
            value = target * (1 + times * Fraction(str(tolerance)))
            yield f"off by {float(times) * tolerance:.0%}", expected, f"{before}{_written(value)}{after}"
