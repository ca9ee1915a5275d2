"""What check-data and training warn of: data that can be read, but where an answer or an image may be lost."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from apo_lora.data.columns import OFF, Columns, holds, looks_like_image
from apo_lora.data.text import row_numbers

LONGEST_GOLD = 200
"""Characters; a longer gold answer is a proof or a solution, which no completion will repeat."""
_OPTIONS = re.compile(r"(?<![A-Za-z])[(\[（]?A\s*[.):\]、．：）].*(?<![A-Za-z])[(\[（]?B\s*[.):\]、．：）]", re.DOTALL)


def unused_columns(columns: Columns, rows: Sequence[tuple[int, Any]], *, named: bool) -> Iterator[str]:
    """Images, videos, sound and choices that a row has and no prompt will show; several columns of images that will be,
    unless `named` in the recipe."""
    mappings = [(number, row) for number, row in rows if isinstance(row, dict)]
    for name in columns.unused_images:
        if having := [number for number, row in mappings if looks_like_image(row.get(name))]:
            others = ", ".join([*columns.image, name])
            yield (
                f"{len(having)} rows have an image in the column {name!r}, which is not read "
                f"({row_numbers(having)}); to show it too, set data.columns.image to [{others}]"
            )
    if len(columns.image) > 1 and not named:
        yield (
            f"the images of a row are those of the columns {', '.join(columns.image)}, in this order; set "
            "data.columns.image if one should be left out"
        )
    for name in columns.media:
        if having := [number for number, row in mappings if holds(row, name)]:
            yield (
                f"{len(having)} rows have video or sound in the column {name!r}, which is not read "
                f"({row_numbers(having)})"
            )
    if columns.unused_choices:
        having = [number for number, row in mappings if holds(row, columns.unused_choices)]
        yield (
            f"{len(having)} rows have choices in the column {columns.unused_choices!r}, which are not read, "
            f"as data.columns.choices is {OFF} ({row_numbers(having)})"
        )


def unusual_golds(examples: Sequence[Any]) -> Iterator[str]:
    """Examples whose gold is a letter of options that no prompt shows, or too long to be an answer."""
    if lost := [e.row for e in examples if not e.choices and is_lost_letter(e.gold, e.problem)]:
        yield (
            f"{len(lost)} gold answers are a letter, but there are no choices ({row_numbers(lost)}); set "
            "data.columns.choices to the column that has them"
        )
    if long := [e.row for e in examples if len(e.gold) > LONGEST_GOLD and not re.search(r"####|\\boxed", e.gold)]:
        yield (
            f"{len(long)} gold answers are longer than {LONGEST_GOLD} characters ({row_numbers(long)}); no "
            "completion will match a proof: set data.columns.answer to a column of final answers, or remove the rows"
        )


def is_lost_letter(gold: str, problem: str) -> bool:
    """Whether the gold is a letter, or several, of options that the problem does not show."""
    return bool(re.fullmatch(r"\(?[A-Z]\)?\.?(?:, [A-Z])*", gold.strip())) and not _OPTIONS.search(problem)
