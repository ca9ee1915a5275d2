"""The fields of the notebook's forms: each is what it must be, or one line says what to write. No package is needed."""

import re
from typing import Any

from apo_lora.notebook.verbs import StepFailed


def text(field: str, value: Any) -> str:
    if not isinstance(value, str | None):
        raise StepFailed(f"{field}: {value!r} is not text; put it into quotes.")
    return (value or "").strip()


def count(field: str, value: Any, at_least: int = 1) -> int:
    """An emptied field is 0, which leaves the recipe's own value."""
    value = value or 0
    if type(value) is not int or value and value < at_least:
        raise StepFailed(f"{field}: {value!r} is not possible; use a whole number from {at_least} on, or 0.")
    return value


def one_of(field: str, value: Any, choices: tuple) -> Any:
    if value not in choices:
        raise StepFailed(f"{field}: {value!r} is not possible; use one of {', '.join(map(repr, choices))}.")
    return value


def repo(field: str, value: Any, needed: bool = False) -> str:
    value = text(field, value)
    if (value or needed) and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        raise StepFailed(f"{field}: {value!r} is not a repository on the Hub; write ORG/NAME.")
    return value


def as_name(value: str) -> str:
    """Of a file or a folder, for a value that may be a path or a Hub id."""
    return re.sub(r"\W+", "_", value).strip("_")
