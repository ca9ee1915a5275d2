"""Rows of answers.jsonl -> the figures of a model on a set, and of the tuned model against the base. Pure functions.

Greedy completions give accuracy and everything beside it; sampled ones give pass@k.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from apo_lora.evaluation.statistics import (
    Pairs,
    bootstrap_interval,
    paired_interval,
    pass_at_k,
    sign_test,
    wilson_interval,
)

MODELS = ("base", "tuned")
OUTCOMES = ("fixed", "broken", "right", "wrong")
"""`right` and `wrong` are so by both models."""

AnswerRow = Mapping[str, Any]
"""A line of answers.jsonl, as measure.answer_rows makes it."""


class AnswerPair(NamedTuple):
    """One answer to one item by each model; None where that model has not answered (yet)."""

    base: AnswerRow | None
    """Of a run that began with lora.start, that adapter's."""
    tuned: AnswerRow | None

    @property
    def either(self) -> AnswerRow:
        return self.tuned or self.base

    @property
    def outcome(self) -> str:
        """One of OUTCOMES; with a single answer, whether that is right."""
        base, tuned = (bool((row or self.either)["correct"]) for row in self)
        if base == tuned:
            return "right" if tuned else "wrong"
        return "fixed" if tuned else "broken"


def paired(rows: Iterable[AnswerRow]) -> list[AnswerPair]:
    """In the order of the rows. They are paired by set, row and sample; the greedy answer is not a sample."""
    found: dict[tuple, dict[str, AnswerRow]] = {}
    for row in rows:
        key = row["set"], row["row"], row.get("sample", 0), row.get("greedy", False)
        found.setdefault(key, {})["base" if row["model"] == "start" else row["model"]] = row
    return [AnswerPair(*map(answers.get, MODELS)) for answers in found.values()]


def all_figures(rows: Iterable[AnswerRow], items: Mapping[str, int]) -> dict[str, Any]:
    """`base`, `tuned` and `difference`, each by title of a set (title -> how many items it has).

    A model that has not answered everything greedily is left out, and so is the difference without both.
    """
    groups = _grouped(rows, "model", "set", "greedy")

    def answers(model: str, title: str, greedy: bool = True) -> list[AnswerRow]:
        return groups.get((model, title, greedy), [])

    figures: dict[str, Any] = {
        model: {
            title: summary(answers(model, title)) | {"pass_at_k": passes(answers(model, title, greedy=False))}
            for title in items
        }
        for model in MODELS
        if all(len(answers(model, title)) == count for title, count in items.items())
    }
    if len(figures) == len(MODELS):
        figures["difference"] = {
            title: compared(*(answers(model, title) for model in MODELS))
            | {"pass_at_k": passes_compared(*(answers(model, title, greedy=False) for model in MODELS))}
            for title in items
        }
    return figures


def summary(rows: Sequence[AnswerRow]) -> dict[str, Any]:
    """Of one completion per item: accuracy with its interval, mean tokens when right and when wrong, and fractions.

    `entropy` is the mean over completions of their nats per token. `categories` has the same for each of them.
    """
    return _figures(rows) | {"categories": {name: _figures(members) for name, members in _by_category(rows)}}


def _figures(rows: Sequence[AnswerRow]) -> dict[str, Any]:
    right = sum(row["correct"] for row in rows)
    low, high = wilson_interval(right, len(rows))
    return {
        "items": len(rows),
        "accuracy": right / len(rows),
        "accuracy_95_low": low,
        "accuracy_95_high": high,
        "length_correct": _mean([row["length"] for row in rows if row["correct"]]),
        "length_wrong": _mean([row["length"] for row in rows if not row["correct"]]),
        "truncated": _mean([row["truncated"] for row in rows]),
        "well_formatted": _mean([row["well_formatted"] for row in rows]),
        "entropy": _mean([row["entropy"] for row in rows if row.get("entropy") is not None]),
    }


def compared(base: Sequence[AnswerRow], tuned: Sequence[AnswerRow]) -> dict[str, Any]:
    """Of one completion per item and model, on the same items: the difference in accuracy, its interval and p.

    `categories` has the same for each of them.
    """
    tuned_members = dict(_by_category(tuned))
    categories = {name: _compared(members, tuned_members[name]) for name, members in _by_category(base)}
    return _compared(base, tuned) | {"categories": categories}


def _compared(base: Sequence[AnswerRow], tuned: Sequence[AnswerRow]) -> dict[str, Any]:
    count = Counter(pair.outcome for pair in paired([*base, *tuned]))
    pairs = Pairs(both=count["right"], only_tuned=count["fixed"], only_base=count["broken"], neither=count["wrong"])
    low, high = paired_interval(pairs)
    return {
        "items": pairs.items,
        "accuracy": pairs.difference,
        "accuracy_95_low": low,
        "accuracy_95_high": high,
        "sign_test_p": sign_test(pairs.only_tuned, pairs.only_base),
        **pairs._asdict(),
    }


def passes(rows: Iterable[AnswerRow]) -> dict[str, dict[str, float]]:
    """pass@k of sampled completions, with its interval, for k = 1, 2, 4, ... and all of them."""
    return {str(k): _with_interval(list(values.values())) for k, values in _pass_values(rows).items()}


def passes_compared(base: Iterable[AnswerRow], tuned: Iterable[AnswerRow]) -> dict[str, dict[str, float]]:
    """The tuned model's pass@k less the base's, item by item, with the interval of the mean."""
    of_tuned = _pass_values(tuned)
    return {
        str(k): _with_interval([of_tuned[k][item] - value for item, value in values.items()])
        for k, values in _pass_values(base).items()
    }


def powers_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({2**i for i in range(most.bit_length())} | {most}) if most else []


def _pass_values(rows: Iterable[AnswerRow]) -> dict[int, dict[int, float]]:
    """k -> item -> estimate."""
    verdicts = {item: [row["correct"] for row in of_item] for (item,), of_item in _grouped(rows, "row").items()}
    most = min(map(len, verdicts.values()), default=0)
    return {
        k: {item: pass_at_k(len(of_item), sum(of_item), k) for item, of_item in verdicts.items()}
        for k in powers_up_to(most)
    }


def _with_interval(values: Sequence[float]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"value": sum(values) / len(values), "95_low": low, "95_high": high}


def _grouped(rows: Iterable[AnswerRow], *keys: str) -> dict[tuple, list[AnswerRow]]:
    found: dict[tuple, list[AnswerRow]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _by_category(rows: Iterable[AnswerRow]) -> list[tuple[str, list[AnswerRow]]]:
    """In the order of their names; nothing where the rows have none."""
    groups = _grouped((row for row in rows if row["category"]), "category")
    return [(name, groups[name,]) for (name,) in sorted(groups)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
