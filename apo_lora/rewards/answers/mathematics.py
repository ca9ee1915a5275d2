"""Equality of two mathematical texts by Math-Verify, behind guards.

Only the LaTeX parser is used: Math-Verify's plain-expression parser ends in sympy's `parse_expr`, which evals.
The guards refuse what cannot be an answer but can burn hours (towers of powers, deep nesting, unknown commands),
so that a call without a sandbox comes back within seconds; `rewards/verifier.py` adds a process that can be killed.
"""

import cmath
import logging
import re
import threading

from apo_lora.rewards.answers.lists import in_brackets, split_list

MAX_MATH_CHARS = 400  # the longest answers worth parsing (lists of tuples) stay well below
_MAX_DEPTH = 8  # the parser's time grows steeply with nesting: 30 deep parentheses take 5 seconds
_MAX_DIGITS = 30
_MAX_EXPONENT = 1000  # the product of all exponents, as towers multiply
_MAX_SIMPLIFY_EXPONENT = 20  # what Math-Verify may have to expand
_MAX_FACTORIAL = 200
_MAX_FUNCTIONS = 12
_MAX_PARTS = 20

_FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp max min gcd det"
_COMMAND_NAMES = """
    frac sqrt pi cdot times div pm mp cup cap infty in notin le ge ne neq lt gt approx equiv theta alpha beta gamma
    delta lambda mu sigma phi varphi omega epsilon rho tau psi eta circ angle triangle overline bar vec hat widehat
    lbrace rbrace langle rangle lvert rvert vert mid setminus emptyset varnothing perp parallel begin end binom
    lfloor rfloor lceil rceil mathcal degree to infinity prime ldots dots cdots"""
_FUNCTIONS = set(_FUNCTION_NAMES.split())
_COMMANDS = _FUNCTIONS | set(_COMMAND_NAMES.split())
_ENVIRONMENTS = {"pmatrix", "bmatrix", "matrix", "vmatrix", "array", "cases"}

# The parser's caches are shared; one lock costs nothing, since Python would run the threads in turns anyway.
_LOCK = threading.Lock()
_POINTS = (0.7390851332, -1.3247179572, 2.2360679775, -0.5671432904, 3.3598856662)
_REL_DECIMAL = 1e-6  # a decimal against a fraction or a root: one part in a million (so 3.14 is not pi)
_REL_EXACT = 1e-12  # two exact expressions: equal up to the error of evaluating them


def is_safe_math(text: str) -> bool:
    """True if `text` may be given to the parser: looks like mathematics, is small, and stays small when evaluated."""
    if not text or len(text) > MAX_MATH_CHARS or not text.isascii():
        return False
    commands = re.findall(r"\\([a-zA-Z]+)", text)
    if any(name not in _COMMANDS for name in commands) or not _environments_known(text):
        return False
    if sum(name in _FUNCTIONS for name in commands) > _MAX_FUNCTIONS or _depth(text) > _MAX_DEPTH:
        return False
    return _letters_are_symbols(text) and _numbers_stay_small(text)


def _environments_known(text: str) -> bool:
    return all(name in _ENVIRONMENTS for name in re.findall(r"\\(?:begin|end)\s*\{([^{}]*)\}?", text))


def _depth(text: str) -> int:
    depth = deepest = 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    return deepest


def _letters_are_symbols(text: str) -> bool:
    """Words are not products of letters: as such "TTP" would equal "PTT", and "5 6" would be the mixed number 11."""
    bare = re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[clr|]*\})?", " ", text)
    bare = re.sub(r"\\[a-zA-Z]+", "#", bare)
    bare = re.sub(r"\b(?:and|or)\b", ",", bare)
    if any(len(run) > 2 and run not in _FUNCTIONS for run in re.findall(r"[a-zA-Z]+", bare)):
        return False
    if re.search(r"\d\s+\d", re.sub(r"(\d)\s+(?=\d{3}(?!\d))", r"\1", bare)):
        return False
    return bool(re.search(r"[\d#+*/^<>=(\[{-]", bare)) or (len(bare.strip()) == 1 and bare.strip().isalnum())


def _numbers_stay_small(text: str) -> bool:
    if any(len(run) > _MAX_DIGITS for run in re.findall(r"\d+", text)):
        return False
    small = all(len(n) <= 3 and int(n) <= _MAX_FACTORIAL for n in re.findall(r"\d+", text))
    if re.search(r"!\s*!|[^\d\s]\s*!(?!=)", text) or (("!" in text or "\\binom" in text) and not small):
        return False
    if re.search(r"\^\s*(?:\{[^{}]*\}|[\d.]+|[^\s{}])\s*(?:\^|\*\*)", text.replace("^\\prime", "")):
        return False  # a tower: 9^9^9
    roots = [int(n) for n in re.findall(r"\\sqrt\s*\[\s*(\d+)", text)]
    return _exponent_product(text) <= _MAX_EXPONENT and max([1, *roots]) <= _MAX_EXPONENT


def _exponent_product(text: str) -> float:
    """The product of all whole numbers in exponents; infinite for a power inside an exponent."""
    product = 1.0
    for exponent in re.finditer(r"(?:\^|\*\*)\s*(\{?)", text):
        if exponent.group(1):
            group = _group(text, exponent.end())
        else:
            group = re.match(r"\(|[-\d\s]*", text[exponent.end() :]).group()
        if "^" in group or "!" in group or "*" in group or "(" in group and not exponent.group(1):
            return float("inf")
        for number in re.findall(r"\d+", group):
            product *= max(1, int(number))
    return product


def _group(text: str, start: int) -> str:
    depth = 1
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start:position]
    return text[start:]


def math_equal(answer: str, gold: str) -> bool:
    """True if the two plain texts are mathematically equal. Works in any thread; never raises."""
    if not (is_safe_math(answer) and is_safe_math(gold)):
        return False
    import math_verify  # noqa: F401  a missing package is no reason to call every answer wrong: it must raise here

    with _LOCK:
        try:
            return _equal_parts(answer, gold)
        except Exception:  # sympy raises nearly everything there is; an answer it cannot compare is not right
            return False


def _equal_parts(answer: str, gold: str) -> bool:
    """Bare lists have the same parts in any order, each as often; tuples have them in the same order."""
    parts, wanted = in_brackets(answer), in_brackets(gold)
    if parts and wanted:
        return len(parts) == len(wanted) and all(map(_equal_parts, parts, wanted))
    parts, left = split_list(answer), split_list(gold)
    if len(parts) == len(left) == 1 or max(len(parts), len(left)) > _MAX_PARTS:
        return _parsed_equal(answer, gold)
    if len(parts) != len(left) and re.search(r"=|\\(?:pm|mp|in|cup)(?![a-z])|[(\[]", answer + gold):
        return _parsed_equal(answer, gold)  # "x = 1, y = 2" and "(1, 2)"
    for part in parts:
        found = next((index for index, wanted in enumerate(left) if _equal_parts(part, wanted)), None)
        if found is None:
            return False
        del left[found]
    return not left


def _parsed_equal(answer: str, gold: str) -> bool:
    a, b = _parse(answer), _parse(gold)
    if a is None or b is None:
        return False
    # A letter under a root is a length or the like: a\sqrt{2} is \sqrt{2a^2}.
    positive = all("\\sqrt" in side and not re.search(r"\||vert", side) for side in (answer, gold))
    by_value = _compare_values(a, b, positive)
    if by_value is not None:
        return by_value
    if a == b:
        return True
    if max(_exponent_product(answer), _exponent_product(gold)) > _MAX_SIMPLIFY_EXPONENT:
        return False
    from math_verify import verify

    return bool(verify(b, a, timeout_seconds=None))


def degrees_to_radians(text: str, everywhere: bool) -> str:
    """The degrees in "\\sin(90° - x)" as what they are; elsewhere a degree sign is a unit, unless asked for."""
    inside = everywhere or any(f"\\{name}" in text for name in ("sin", "cos", "tan", "cot", "sec", "csc"))
    return re.sub(r"(\d+(?:\.\d+)?)\s*°", r"(\\frac{\1\\pi}{180})", text) if inside else text


def _parse(text: str):
    from math_verify import LatexExtractionConfig, parse

    # Without a time limit Math-Verify logs a warning; the limit (signal.alarm) would fail outside the main thread.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _compare_values(a, b, positive: bool) -> bool | None:
    """Compare two expressions by their values, at several points if they have variables; None for sets and the like.

    Math-Verify would `simplify` the difference of unequal expressions: seconds for nested roots, hours for powers of
    sums. Expressions that agree at points chosen without regard to them are equal for every practical purpose.
    """
    from sympy import Eq, Expr, Float, I

    if isinstance(a, Eq) and isinstance(b, Expr):
        a = a.rhs  # "x = 5" for 5; a gold equation is left to Math-Verify
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return None
    a, b = (side.subs({symbol: I for symbol in side.free_symbols if symbol.name == "i"}) for side in (a, b))
    if a.free_symbols != b.free_symbols:
        return _same_name(a, b)
    tolerance = _REL_DECIMAL if a.has(Float) or b.has(Float) else _REL_EXACT
    symbols = sorted(a.free_symbols, key=str)
    points = [abs(point) for point in _POINTS] if positive else _POINTS
    for shift in range(len(points) if symbols else 1):
        point = {symbol: points[(shift + i) % len(points)] for i, symbol in enumerate(symbols)}
        x, y = (complex(side.evalf(25, subs=point)) for side in (a, b))
        if not (cmath.isfinite(x) and cmath.isfinite(y)):
            return a == b  # an overflow is within any tolerance of any other
        if abs(x - y) > tolerance * max(abs(x), abs(y)):
            return False
    return True


def _same_name(a, b) -> bool:
    """Names that differ only in writing (`\\text{e}` and `e`) are for Math-Verify's own rules; both are small."""
    from math_verify import verify
    from sympy import Symbol

    return (isinstance(a, Symbol) or isinstance(b, Symbol)) and bool(verify(b, a, timeout_seconds=None))
