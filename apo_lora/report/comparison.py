"""What groups of runs say when compared: means over seeds, differences seed by seed, their 95 % t intervals.

The report's tables, and the sweep's sweep.json, tables and plot are all based on this.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import mpmath

from apo_lora.report.runs import Run
from apo_lora.run.figures import format_figure


class Compared(NamedTuple):
    """A figure that runs are compared by."""

    key: str
    """In sweep.json."""
    title: str
    unit: str
    name: str
    """Of the figure, in eval.json or metrics.jsonl."""
    task: str | None = None
    """In eval.json; None for a figure of the training record."""
    course: str | None = None
    """The figure of the training record that shows how it got there."""


COMPARED = (
    Compared("accuracy", "Reasoning accuracy", "fraction right", "accuracy", "reasoning", "accuracy"),
    Compared("length_wrong", "Length of wrong answers", "tokens", "length_wrong", "reasoning", "length_wrong"),
    Compared("entropy", "Entropy", "nats per token", "entropy", course="entropy"),
    Compared("general_accuracy", "General accuracy", "fraction right", "accuracy", "general"),
    Compared("kl", "KL to the reference", "nats per token", "kl", course="kl"),
)

When = Literal["before", "after"]


def value(run: Run, compared: Compared, when: When, final_steps: int) -> float | None:
    """On held-out items before or after training; else at the first step, or the mean over the last ones."""
    if compared.task:
        return run.evaluation.get(when, {}).get(compared.task, {}).get(compared.name)
    steps = run.steps[compared.name]
    mean = (steps.head(1) if when == "before" else steps.tail(final_steps)).mean()
    return None if mean != mean else float(mean)


# --- over seeds ------------------------------------------------------------------------------------------------------


Estimate = dict[str, Any]
"""mean, low, high (the 95 % interval of Student's t; None where n is 1), n, excludes_zero; as sweep.json holds it."""


@cache
def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """The t that a Student's t variable stays within (either side) with this probability."""

    def inside(t: float) -> float:
        # P(|T| < t), through the incomplete beta function (Abramowitz and Stegun 26.7.1).
        return mpmath.betainc(0.5, degrees / 2, 0, t * t / (degrees + t * t), regularized=True)

    # The upper end holds for one degree of freedom, whose tails are the heaviest: t = tan(pi c / 2) < 2 / (1 - c).
    ends = (0, 2 / (1 - confidence))
    return float(mpmath.findroot(lambda t: inside(t) - confidence, ends, solver="illinois", tol=1e-20))


def mean_over_seeds(values: Iterable[float | None]) -> Estimate | None:
    """Of those that are there; None for no values."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    n, mean, low, high = len(values), statistics.fmean(values), None, None
    if n > 1:
        half = t_quantile(n - 1) * statistics.stdev(values) / n**0.5
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "n": n, "excludes_zero": n > 1 and not low <= 0 <= high}


BySeed = Mapping[int, float | None]


def difference_by_seed(values: BySeed, baseline: BySeed) -> Estimate | None:
    """`values` minus `baseline`, over the seeds that have both, so that effects of the seed cancel out."""
    seeds = [seed for seed in values if values[seed] is not None and baseline.get(seed) is not None]
    return mean_over_seeds(values[seed] - baseline[seed] for seed in seeds)


def compare(groups: Mapping[str, Sequence[Run]], final_steps: int) -> dict[str, Any]:
    """Key to title, unit, the base's estimate, and per group (the first is the baseline) estimate and difference.

    All groups start from the same base, seed by seed.
    """
    starts = {run.seed: run for runs in groups.values() for run in runs}.values()
    found = {}
    for compared in COMPARED:
        ends = {
            label: {run.seed: value(run, compared, "after", final_steps) for run in runs}
            for label, runs in groups.items()
        }
        baseline, *others = ends
        means = {label: mean_over_seeds(by_seed.values()) for label, by_seed in ends.items()}
        found[compared.key] = {
            "title": compared.title,
            "unit": compared.unit,
            "before": mean_over_seeds(value(run, compared, "before", final_steps) for run in starts),
            "variants": {label: mean and {**mean, "by_seed": ends[label]} for label, mean in means.items()},
            "differences": {label: difference_by_seed(ends[label], ends[baseline]) for label in others},
        }
    return found


# --- as text --------------------------------------------------------------------------------------------------------


def format_estimate(estimate: Estimate | None, name: str, sign: str = "") -> str:
    """`0.871 (0.850 to 0.890)`; a dash for nothing, no interval for a single seed."""
    if estimate is None:
        return "-"
    interval = f" ({format_interval(estimate, name, sign)})" if estimate["low"] is not None else ""
    return format_figure(name, estimate["mean"], sign) + interval


def format_interval(estimate: Estimate, name: str, sign: str = "") -> str:
    return f"{format_figure(name, estimate['low'], sign)} to {format_figure(name, estimate['high'], sign)}"


HEADINGS = tuple(compared.title for compared in COMPARED)


def mean_rows(figures: dict[str, Any]) -> list[list[str]]:
    """Heading, the base, then a row per group: mean and 95 % interval of every figure."""

    def row(label: str, estimate_of: Any) -> list[str]:
        return [label, *(format_estimate(estimate_of(figures[c.key]), c.name) for c in COMPARED)]

    groups = figures[COMPARED[0].key]["variants"]
    return [
        ["", *HEADINGS],
        row("before", lambda figure: figure["before"]),
        *(row(group, lambda figure, group=group: figure["variants"][group]) for group in groups),
    ]


def difference_rows(figures: dict[str, Any], baseline: str) -> list[list[str]]:
    """The differences from the baseline, seed by seed; a star where the interval excludes 0."""
    rows = [[f"minus {baseline}", *HEADINGS]]
    for group in figures[COMPARED[0].key]["differences"]:
        estimates = [(figures[compared.key]["differences"][group], compared.name) for compared in COMPARED]
        stars = [" *" if estimate and estimate["excludes_zero"] else "" for estimate, _ in estimates]
        words = [format_estimate(estimate, name, "+") for estimate, name in estimates]
        rows.append([group, *map(str.__add__, words, stars)])
    return rows
