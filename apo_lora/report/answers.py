"""Held-out answers, those of the base beside those of the tuned model, and what changed between them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from apo_lora.report.runs import Row

OUTCOMES = ("fixed", "broken", "right", "wrong")
"""`right` and `wrong` are so before and after."""


@dataclass(frozen=True)
class Pair:
    """One sampled answer to one item by each model; None where that model has not answered (yet)."""

    base: Row | None
    tuned: Row | None

    @property
    def either(self) -> Row:
        return self.tuned or self.base

    @property
    def outcome(self) -> str:
        """One of OUTCOMES; with a single answer, whether that is right."""
        was, became = (row and bool(row["correct"]) for row in (self.base, self.tuned))
        if None in (was, became) or was == became:
            return "right" if self.either["correct"] else "wrong"
        return "fixed" if became else "broken"


def paired(rows: Iterable[Row]) -> list[Pair]:
    """In the order of the file. Rows are paired by set, row and sample; the likeliest answer is no sample."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["set"], row["row"], row.get("sample", 0), row.get("greedy", False)), {})[row["model"]] = (
            row
        )
    return [Pair(models.get("base"), models.get("tuned")) for models in found.values()]


@dataclass(frozen=True)
class Tally:
    """Of one set: how many answers there are, and how many went which way."""

    title: str
    answers: int
    fixed: int
    broken: int
    right: int
    wrong: int

    @property
    def base_accuracy(self) -> float:
        return (self.right + self.broken) / self.answers

    @property
    def tuned_accuracy(self) -> float:
        return (self.right + self.fixed) / self.answers


def tallies(pairs: Sequence[Pair]) -> list[Tally]:
    """A row per set, over the answers that both models gave."""
    counts: dict[str, Counter] = {}
    for pair in pairs:
        if pair.base and pair.tuned:
            counts.setdefault(pair.base["set"], Counter())[pair.outcome] += 1
    return [Tally(title, seen.total(), **{name: seen[name] for name in OUTCOMES}) for title, seen in counts.items()]
