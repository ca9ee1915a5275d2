"""Rows of answers.jsonl -> the figures of a model on a set, and of the tuned model against the base. Pure functions.

Greedy completions give accuracy and everything beside it; sampled ones give pass@k.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from apo_lora.evaluation.statistics import (
    Pairs,
    bootstrap_interval,
    paired_interval,
    pass_at_k,
    sign_test,
    wilson_interval,
)

Row = Mapping[str, Any]


def all_figures(rows: Sequence[Row], items: Mapping[str, int]) -> dict[str, Any]:
    """`base`, `tuned` and `difference`, each by title of a set (title -> how many items it has).

    A model that has not answered everything greedily is left out, and so is the difference without both.
    """
    greedy: dict[tuple[str, str], list[Row]] = {}
    sampled: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        (greedy if row["greedy"] else sampled).setdefault((row["model"], row["set"]), []).append(row)
    figures: dict[str, Any] = {
        model: {
            title: summary(greedy[model, title]) | {"pass_at_k": passes(sampled.get((model, title), []))}
            for title in items
        }
        for model in ("base", "tuned")
        if all(len(greedy.get((model, title), [])) == count for title, count in items.items())
    }
    if len(figures) == 2:
        figures["difference"] = {
            title: compared(greedy["base", title], greedy["tuned", title])
            | {
                "categories": compared_by_category(greedy["base", title], greedy["tuned", title]),
                "pass_at_k": passes_compared(sampled.get(("base", title), []), sampled.get(("tuned", title), [])),
            }
            for title in items
        }
    return figures


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one completion per item: accuracy with its interval, mean tokens when right and when wrong, and fractions.

    `entropy` is the mean over completions of their nats per token. `categories` has the same for each of them.
    """
    return _figures(rows) | {"categories": {name: _figures(members) for name, members in _by_category(rows).items()}}


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
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


def compared(base: Sequence[Row], tuned: Sequence[Row]) -> dict[str, Any]:
    """Of one completion per item and model, on the same items: the difference in accuracy, its interval and p."""
    pairs = _pairs(base, tuned)
    low, high = paired_interval(pairs)
    return {
        "items": pairs.items,
        "accuracy": pairs.difference,
        "accuracy_95_low": low,
        "accuracy_95_high": high,
        "sign_test_p": sign_test(pairs.only_tuned, pairs.only_base),
        **pairs._asdict(),
    }


def compared_by_category(base: Sequence[Row], tuned: Sequence[Row]) -> dict[str, dict[str, Any]]:
    tuned_members = _by_category(tuned)
    return {category: compared(rows, tuned_members[category]) for category, rows in _by_category(base).items()}


def passes(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """pass@k of sampled completions, with its interval, for k = 1, 2, 4, ... and all of them."""
    return {str(k): _with_interval(list(values.values())) for k, values in _pass_values(rows).items()}


def passes_compared(base: Sequence[Row], tuned: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The tuned model's pass@k less the base's, item by item, with the interval of the mean."""
    of_tuned = _pass_values(tuned)
    return {
        str(k): _with_interval([of_tuned[k][item] - value for item, value in values.items()])
        for k, values in _pass_values(base).items()
    }


def powers_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({2**i for i in range(most.bit_length())} | {most}) if most else []


def _pairs(base: Sequence[Row], tuned: Sequence[Row]) -> Pairs:
    of_tuned = {row["row"]: row["correct"] for row in tuned}
    verdicts = [(row["correct"], of_tuned[row["row"]]) for row in base]
    return Pairs(
        both=sum(b and t for b, t in verdicts),
        only_tuned=sum(t and not b for b, t in verdicts),
        only_base=sum(b and not t for b, t in verdicts),
        neither=sum(not b and not t for b, t in verdicts),
    )


def _pass_values(rows: Sequence[Row]) -> dict[int, dict[int, float]]:
    """k -> item -> estimate."""
    verdicts: dict[int, list[bool]] = {}
    for row in rows:
        verdicts.setdefault(row["row"], []).append(row["correct"])
    most = min((len(of_item) for of_item in verdicts.values()), default=0)
    return {
        k: {item: pass_at_k(len(of_item), sum(of_item), k) for item, of_item in verdicts.items()}
        for k in powers_up_to(most)
    }


def _with_interval(values: Sequence[float]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"value": sum(values) / len(values), "95_low": low, "95_high": high}


def _by_category(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """In the order of their names; nothing where the rows have none."""
    found: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row["category"]), key=lambda row: row["category"]):
        found.setdefault(row["category"], []).append(row)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
