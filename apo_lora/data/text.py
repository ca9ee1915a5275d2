"""Scalars of a data set as text, and the exception for a row that cannot be used."""

import math
from collections.abc import Iterable
from typing import Any

from apo_lora.errors import printable

_MAX_ROWS_NAMED = 10


class BadRow(Exception):
    """A row that cannot be used: `reason` is counted, `detail` says what was found, in one short line."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, _one_line(detail)
        super().__init__(f"{reason}: {self.detail}")


def content(value: Any) -> Any:
    """What a Cell (images.py) has in its table on disk; anything else is itself."""
    return value.read() if hasattr(value, "read") else value


def as_text(value: Any) -> str:
    """Text of a scalar: 3.0 is "3", what holds nothing (None, NaN) is "", bytes are UTF-8. Raises BadRow."""
    value = content(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise BadRow("not text", f"bytes that are not UTF-8: {short(value)}") from None
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return "" if value is None else str(value)


def short(value: Any) -> str:
    return _one_line(repr(value), 60)


def row_numbers(numbers: Iterable[int]) -> str:
    """ "row 3", "rows 3, 5", of many "rows 1, 2, ... and 12 more"."""
    numbers = list(numbers)
    named = ", ".join(map(str, numbers[:_MAX_ROWS_NAMED]))
    more = f" and {len(numbers) - _MAX_ROWS_NAMED} more" if len(numbers) > _MAX_ROWS_NAMED else ""
    return f"row{'s' * (len(numbers) > 1)} {named}{more}"


def _one_line(text: str, most: int = 300) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 3]}..."
