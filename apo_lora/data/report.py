"""What a data set holds, before training: kinds of answers, images, prompt lengths, and every row that was dropped."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apo_lora.data.examples import Dropped, Example, Loaded, prompt_lengths
from apo_lora.recipe.schema import DataSection

ANSWER_KINDS = ("number", "choice letter", "choice text", "yes/no", "latex", "text")

_NUMBER = re.compile(r"[$€£]?[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?\s*%?")
_LETTER = re.compile(r"\(?([A-Z])\)?\.?")


@dataclass(frozen=True)
class Spread:
    """How a count is distributed over examples."""

    least: int
    median: int
    p95: int
    most: int

    @classmethod
    def of(cls, values: Sequence[int]) -> "Spread":
        """Each figure is one of the values: the smallest that so large a share of them does not exceed."""
        ordered = sorted(values)
        return cls(*(ordered[max(0, -(-len(ordered) * percent // 100) - 1)] for percent in (0, 50, 95, 100)))


@dataclass(frozen=True)
class DataReport:
    """What `report` found. `lines` makes it readable."""

    source: str
    num_rows: int
    num_usable: int
    answer_kinds: dict[str, int]
    category_counts: dict[str, int]
    images_per_row: dict[int, int]
    """Number of images -> rows with that many."""
    image_sizes: tuple[tuple[int, int], ...]
    """Smallest, median and largest (width, height), by area; empty without images."""
    prompt_tokens: Spread | None
    """None where no processor was given."""
    max_prompt_tokens: int
    num_too_long: int
    """Usable rows whose prompt is over the limit, where they have not been dropped yet."""
    dropped: Dropped
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as a table of aligned lines."""
        num_dropped = sum(len(rows) for rows in self.dropped.values())
        table = [
            ("data", self.source),
            ("rows", f"{self.num_rows:,} ({self.num_usable:,} usable, {num_dropped:,} dropped)"),
        ]
        table.append(("answers", _counts(self.answer_kinds)))
        if self.category_counts:
            table.append(("categories", _counts(self.category_counts)))
        per_row = {f"rows with {n}": count for n, count in sorted(self.images_per_row.items())}
        table.append(("images", f"{sum(n * c for n, c in self.images_per_row.items()):,}; {_counts(per_row)}"))
        if self.image_sizes:
            least, median, most = (f"{width} x {height}" for width, height in self.image_sizes)
            table.append(("image size", f"min {least}, median {median}, max {most}"))
        if tokens := self.prompt_tokens:
            spread = f"min {tokens.least:,}, median {tokens.median:,}, 95% {tokens.p95:,}, max {tokens.most:,}"
            over = f"{self.num_too_long:,} over the limit of {self.max_prompt_tokens:,}"
            table.append(("prompt tokens", f"{spread}; {over}"))
        width = max(len(label) for label, _ in table)
        return [f"{label:<{width}}  {value}" for label, value in table] + self._closing_lines()

    def _closing_lines(self) -> list[str]:
        bad = sorted((row, reason, detail) for reason, rows in self.dropped.items() for row, detail in rows)
        dropped = [f"dropped row {row}: {reason} ({detail})" for row, reason, detail in bad]
        return dropped + [f"warning: {warning}" for warning in self.warnings]


def report(loaded: Loaded, data: DataSection, processor: Any = None) -> DataReport:
    """Looks through the examples without decoding an image. Prompt lengths need a processor."""
    examples = loaded.examples
    sizes = sorted((image.size for example in examples for image in example.images), key=lambda s: (s[0] * s[1], s))
    lengths = prompt_lengths(examples, processor, data) if processor is not None else []
    kinds = Counter(answer_kind(example) for example in examples)
    categories = Counter(example.category for example in examples if example.category)
    return DataReport(
        source=loaded.source,
        num_rows=loaded.num_rows,
        num_usable=len(examples),
        answer_kinds={kind: kinds[kind] for kind in ANSWER_KINDS if kinds[kind]},
        category_counts=dict(categories.most_common()),
        images_per_row=dict(Counter(len(example.images) for example in examples)),
        image_sizes=(sizes[0], sizes[(len(sizes) - 1) // 2], sizes[-1]) if sizes else (),
        prompt_tokens=Spread.of(lengths) if lengths else None,
        max_prompt_tokens=data.max_prompt_tokens,
        num_too_long=sum(length > data.max_prompt_tokens for length in lengths),
        dropped=loaded.dropped,
        warnings=loaded.warnings,
    )


def answer_kind(example: Example) -> str:
    """One of ANSWER_KINDS, by the look of the gold answer."""
    answer = example.answers[0].strip()
    letter = _LETTER.fullmatch(answer)
    if letter and (example.choices is None or ord(letter[1]) - ord("A") < len(example.choices)):
        return "choice letter"
    if example.choices and answer in example.choices:
        return "choice text"
    if answer.lower().rstrip(".") in ("yes", "no", "true", "false"):
        return "yes/no"
    bare = answer.strip("$").strip()
    if any(character.isdigit() for character in bare) and _NUMBER.fullmatch(bare):
        return "number"
    return "latex" if re.search(r"[\\^_{}$]", answer) else "text"


def _counts(counts: dict[str, int], most: int = 12) -> str:
    named = [f"{name}: {count:,}" for name, count in list(counts.items())[:most]]
    more = [f"{len(counts) - most} more"] if len(counts) > most else []
    return ", ".join(named + more) or "none"
