"""The parts of an answer: lists, tuples, "x = 5", a named point, an interval. Pure functions on plain texts."""

import re

_SEPARATOR = re.compile(r"\s*(?:[,;]\s*(?:and\b|or\b)?|\b(?:and|or)\b|(?<=\d)(?:and|or)(?=\d)|[和与或&])\s*")
_OPEN, _CLOSE = "([{", ")]}"


def split_list(text: str) -> list[str]:
    """The parts between top-level commas, semicolons, "and" and "or": "2, (3, 4) and 5" to three. One part if none."""
    if r"\begin" in text:
        return [text]
    inner = re.fullmatch(r"\\?\{([^{}]*?)\\?\}|\\\{(.*)\\\}|\\lbrace(.*)\\rbrace", text)
    text = next((group for group in inner.groups() if group), "") if inner else text
    depth, deep = 0, []
    for sign in text:
        depth -= sign in _CLOSE
        deep.append(depth > 0)
        depth += sign in _OPEN
    spaced = ", " in text
    parts, start = [], 0
    for match in _SEPARATOR.finditer(text):
        if deep[match.start()] or match.start() < start:
            continue
        if spaced and match.group() == "," and re.match(r"\d,\d{3}(?!\d)", text[max(0, match.start() - 1) :]):
            continue  # 1,000, 2,000
        parts.append(text[start : match.start()])
        start = match.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()] or [text]


def solutions(text: str) -> list[str]:
    """`split_list`, with "2 \\pm x" as the two that it is."""
    parts = []
    for part in split_list(text):
        signs = (r"\pm", r"\mp") if part.count(r"\pm") + part.count(r"\mp") == 1 else ()
        sign = next((sign for sign in signs if sign in part), None)
        name, value = unname(part)
        before, _, after = value.partition(sign) if sign else (value, "", "")
        lead = f"{name} = " if sign and name else ""
        parts += [f"{lead}{before}+{after}", f"{lead}{before}-{after}"] if sign else [part]
    return [re.sub(r"^((?:[^=]*= )?)\+", r"\1", part) for part in parts]


def in_brackets(text: str) -> list[str] | None:
    """The parts of the tuple "(1, x)"; None for anything else, "(x)(y)" included."""
    if not re.fullmatch(r"\(.*\)", text, re.DOTALL):
        return None
    depth = 0
    for position, sign in enumerate(text):
        depth += (sign in _OPEN) - (sign in _CLOSE)
        if depth == 0 and position < len(text) - 1:
            return None
    parts = split_list(text[1:-1])
    return parts if len(parts) > 1 else None


# Prose, a row of a matrix, or what encloses a formula.
_NO_ANSWER_LINE = re.compile(r"[a-z]{3,} [a-z]{2,}|\\\\$|[{&]$|\\(?:begin|end)|^\W*$")


def written_apart(text: str) -> list[str] | None:
    """The answers of several blanks, whose order counts: on lines of their own, or "$$3$$ $$8$$"."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if len(lines) > 1 and not any(len(line) > 40 or _NO_ANSWER_LINE.search(line) for line in lines):
        return lines
    spans = re.findall(r"\$\$([^$]+)\$\$", text)
    between = re.sub(r"\$\$[^$]+\$\$", "", text)
    return [span.strip() for span in spans] if len(spans) > 1 and not between.strip(" ,;、.*\n") else None


_NAME = r"[a-zA-Z\\][\w\\ ^{}°:']{0,30}"
_FUNCTION = re.compile(r"[a-z]\s*\(\s*[a-z]\s*\)")


def unname(text: str) -> tuple[str, str]:
    """(name, value) of "x = 5", "5 = x", "f(x) = 2x" and "P(2, 5)"; ("", text) where nothing is named."""
    point = re.fullmatch(r"(?:(?:the )?point )?([A-Z]'?)\s*(\([^()]*,[^()]*\))", text)
    if point:
        return point.group(1), point.group(2)
    sides = [side.strip() for side in text.split("=")]
    if len(sides) != 2 or not all(sides) or re.search(r"[<>!,;]=?|\\(?:le|ge|ne)(?![a-z])", sides[0]):
        return "", text
    name, value = sides
    if re.fullmatch(r"[a-zA-Z]{1,3}'?", value) and not re.search("[a-zA-Z]", re.sub(r"\\[a-z]+", "", name)):
        name, value = value, name
    return (re.sub(r"\s", "", name), value) if re.fullmatch(_NAME, name) or _FUNCTION.fullmatch(name) else ("", text)


def same_name(a: str, b: str) -> bool:
    """y and f(x) are the same; x and y, or f(x) and g(x), are not."""
    return a == b or "y" in (a, b) and bool(_FUNCTION.fullmatch(a) or _FUNCTION.fullmatch(b))


_SIDE = r"([^<>=]*?[^<>=\s])"
_CHAIN = re.compile(rf"{_SIDE}\s*(<|\\le)\s*[a-zA-Z]\s*(<|\\le)\s*{_SIDE}")
_FALLING = re.compile(rf"{_SIDE}\s*(>|\\ge)\s*[a-zA-Z]\s*(>|\\ge)\s*{_SIDE}")
_ONE_SIDED = re.compile(rf"[a-zA-Z]\s*(<|>|\\le|\\ge)\s*{_SIDE}")


def as_interval(text: str) -> str:
    """ "-1 < x \\le 4" as "(-1,4]", "x > 4" as "(4,\\infty)"; anything else as it is."""
    if chain := _CHAIN.fullmatch(text):
        low, left, right, high = chain.groups()
    elif chain := _FALLING.fullmatch(text):
        high, right, left, low = chain.groups()
    elif chain := _ONE_SIDED.fullmatch(text):
        sign, bound = chain.groups()
        up = sign in (">", r"\ge")
        low, left, right, high = (bound, sign, "<", r"\infty") if up else (r"-\infty", "<", sign, bound)
    else:
        return text
    return f"{'(' if left in '<>' else '['}{low},{high}{')' if right in '<>' else ']'}"


def as_matrix(text: str) -> str:
    """ "[[1,2],[3,4]]" as a pmatrix; anything else as it is."""
    if not re.fullmatch(r"\[(?:\s*\[[^\[\]]*\]\s*,?)+\]", text):
        return text
    rows = re.findall(r"\[([^\[\]]*)\]", text)
    return r"\begin{pmatrix}" + r"\\ ".join(row.replace(",", "&") for row in rows) + r"\end{pmatrix}"
