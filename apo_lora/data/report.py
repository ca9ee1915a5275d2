"""What a data set holds, before training: kinds of answers, images, prompt lengths, and every row that was dropped."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from apo_lora.data.examples import Example, Loaded, prompt_lengths
from apo_lora.recipe.schema import DataSection

ANSWER_KINDS = ("number", "choice letter", "choice text", "yes/no", "latex", "text")

_NUMBER = re.compile(r"[$€£]?[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?\s*%?")
_LETTER = re.compile(r"\(?([A-Z])\)?\.?")


def report(loaded: Loaded, data: DataSection, processor: Any = None) -> list[str]:
    """The report as aligned lines. Decodes no image; prompt lengths need a processor."""
    examples = loaded.examples
    kinds = Counter(answer_kind(example) for example in examples)
    categories = Counter(example.category for example in examples if example.category)
    per_row = Counter(len(example.images) for example in examples)
    sizes = sorted((image.size for example in examples for image in example.images), key=lambda s: (s[0] * s[1], s))
    table = {
        "data": loaded.source,
        "rows": f"{loaded.num_rows:,} ({len(examples):,} usable, {loaded.num_dropped:,} dropped)",
        "answers": _counts({kind: kinds[kind] for kind in ANSWER_KINDS if kinds[kind]}),
    }
    if categories:
        table["categories"] = _counts(dict(categories.most_common()))
    rows_with = {f"rows with {n}": count for n, count in sorted(per_row.items())}
    table["images"] = f"{len(sizes):,}; {_counts(rows_with)}"
    if sizes:
        least, median, most = (f"{width} x {height}" for width, height in spread(sizes, (0, 50, 100)))
        table["image size"] = f"min {least}, median {median}, max {most}"
    if lengths := prompt_lengths(examples, processor, data) if processor is not None else []:
        least, median, p95, most = spread(sorted(lengths), (0, 50, 95, 100))
        over = sum(length > data.max_prompt_tokens for length in lengths)
        table["prompt tokens"] = (
            f"min {least:,}, median {median:,}, 95% {p95:,}, max {most:,}; "
            f"{over:,} over the limit of {data.max_prompt_tokens:,}"
        )
    width = max(map(len, table))
    bad = sorted((row, reason, detail) for reason, rows in loaded.dropped.items() for row, detail in rows)
    return [
        *(f"{label:<{width}}  {value}" for label, value in table.items()),
        *(f"dropped row {row}: {reason} ({detail})" for row, reason, detail in bad),
        *(f"warning: {warning}" for warning in loaded.warnings),
    ]


def spread(ordered: Sequence[Any], percents: Sequence[int]) -> list[Any]:
    """Values that occur: for each percentage the smallest that so large a share of them does not exceed."""
    return [ordered[max(0, -(-len(ordered) * percent // 100) - 1)] for percent in percents]


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
