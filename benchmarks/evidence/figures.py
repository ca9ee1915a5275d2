"""What the experiments measure: figures of a run, means over seeds, differences seed by seed. Intervals are 95 %."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from apo_lora.report.comparison import BySeed, difference_by_seed, mean_over_seeds
from apo_lora.report.runs import Run
from apo_lora.run.files import read_jsonl
from benchmarks.evidence.tasks import EASY, HARD

FINAL_STEPS = 10

Value = Callable[[Run, str], float | None]
"""Of a run, `before` or `after` training; None where it was not measured."""


class Figure(NamedTuple):
    key: str
    title: str
    unit: str
    value: Value
    formatted_as: str
    """The figure of a run whose format it takes."""


def held_out(task: str, name: str, category: str | None = None) -> Value:
    def value(run: Run, when: str) -> float | None:
        measured = run.evaluation.get(when, {}).get(task, {})
        return (measured["categories"].get(category, {}) if category and measured else measured).get(name)

    return value


def last_steps(name: str) -> Value:
    """Mean over the last steps; at the base itself, before training, the KL is 0."""

    def value(run: Run, when: str) -> float | None:
        return float(run.steps[name].tail(FINAL_STEPS).mean()) if when == "after" else 0.0

    return value


ACCURACY = Figure("accuracy", "Accuracy", "fraction right", held_out("reasoning", "accuracy"), "accuracy")
LENGTHS = (
    Figure("length_wrong", "Length of wrong answers", "tokens", held_out("reasoning", "length_wrong"), "length_wrong"),
    Figure(
        "length_correct", "Length of right answers", "tokens", held_out("reasoning", "length_correct"), "length_wrong"
    ),
)
ENTROPY = Figure("entropy", "Entropy", "nats per token", held_out("reasoning", "entropy"), "entropy")
KL = Figure("kl", "KL to the base", "nats per token", last_steps("kl"), "kl")
MIXED = (
    Figure("hard", "Accuracy on hard questions", "fraction right", held_out("reasoning", "accuracy", HARD), "accuracy"),
    Figure("easy", "Accuracy on easy questions", "fraction right", held_out("reasoning", "accuracy", EASY), "accuracy"),
    Figure("general", "General accuracy", "fraction right", held_out("general", "accuracy"), "accuracy"),
    KL,
    ENTROPY,
)
EVEN = (*LENGTHS, ACCURACY, ENTROPY, KL)

ByVariant = Mapping[str, Sequence[Run]]


def measured(groups: ByVariant, figures: Iterable[Figure], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Of each figure: before training, each variant by seed with its mean, and of each pair the difference."""
    starts = {run.seed: run for runs in groups.values() for run in runs}.values()
    pairs = list(pairs)
    found = {}
    for figure in figures:
        by_seed = {label: {run.seed: figure.value(run, "after") for run in runs} for label, runs in groups.items()}
        means = {label: mean_over_seeds(values.values()) for label, values in by_seed.items()}
        found[figure.key] = {
            "title": figure.title,
            "unit": figure.unit,
            "before": mean_over_seeds(figure.value(run, "before") for run in starts),
            "variants": {label: mean and {**mean, "by_seed": by_seed[label]} for label, mean in means.items()},
            "differences": {
                f"{one} minus {other}": difference_by_seed(by_seed[one], by_seed[other]) for one, other in pairs
            },
        }
    return found


def pooled(found: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Of each figure the mean difference over all pairs, taken seed by seed: the interval is over seeds."""

    def over_pairs(variants: dict[str, Any], place: int) -> BySeed:
        columns = [variants[pair[place]]["by_seed"] for pair in pairs]
        return {seed: statistics.fmean(column[seed] for column in columns) for seed in columns[0]}

    return {
        key: difference_by_seed(over_pairs(figure["variants"], 0), over_pairs(figure["variants"], 1))
        for key, figure in found.items()
    }


def mean_kl_weight(runs: Iterable[Run]) -> float:
    """Of all completions that these runs trained on: what a constant weight must be to weaken the KL as much."""
    weights = [row["kl_weight"] for run in runs for row in read_jsonl(run.folder.completions)]
    return statistics.fmean(weights)
