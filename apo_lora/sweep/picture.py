"""The findings as one picture: a column per figure, its course above and where it ends below."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apo_lora.sweep.figures import FIGURES, Figure, Record

# Okabe and Ito's palette, told apart by every kind of colour vision; the marker says it once more.
STYLES = (
    ("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "D"),
    ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"),
)  # fmt: skip

SMOOTHING_STEPS = 5

Records = Mapping[str, Mapping[int, Record]]
"""Variant to seed to the record of its run."""


def draw(records: Records, findings: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(15, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(2, len(FIGURES))
    styles = {variant: STYLES[i % len(STYLES)] for i, variant in enumerate(findings["variants"])}
    for figure, (above, below) in zip(FIGURES, grid.T, strict=True):
        found = findings["figures"][figure.key]
        above.set_title(figure.title, fontsize=14)
        if figure.per_step:
            _course(above, figure, records, styles)
        else:
            _before_and_after(above, found, styles)
        _ends(below, found, styles)
        for axes in (above, below):
            axes.grid(alpha=0.3)
            axes.set_ylabel(figure.unit, fontsize=12)
            axes.tick_params(labelsize=11)
    handles = [
        above.plot([], [], color=colour, marker=marker, label=variant)[0]
        for variant, (colour, marker) in styles.items()
    ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=len(styles), frameon=False, fontsize=15)
    canvas.savefig(path)


def _course(axes: Any, figure: Figure, records: Records, styles: Mapping[str, tuple[str, str]]) -> None:
    """Mean over seeds of the training rollouts, smoothed; the band reaches from the lowest seed to the highest."""
    for variant, by_seed in records.items():
        steps, means, lows, highs = course([rows for _, rows in by_seed.values()], figure.per_step)
        colour, marker = styles[variant]
        axes.plot(steps, means, color=colour, marker=marker, markevery=max(1, len(steps) // 6), lw=1.8)
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.13, linewidth=0)
    axes.set_xlabel("training step", fontsize=12)


def course(
    runs: Sequence[Sequence[dict[str, Any]]], metric: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, and per step mean, lowest and highest of a metric's running means, as far as every run has come."""
    smoothed = [_running_means([row.get(metric) for row in rows]) for rows in runs]
    by_step = enumerate(zip(*smoothed, strict=False), start=1)  # zip ends with the shortest
    points = [(step, sum(v) / len(v), min(v), max(v)) for step, v in by_step if None not in v]
    steps, means, lows, highs = map(list, zip(*points, strict=True)) if points else ([], [], [], [])
    return steps, means, lows, highs


def _running_means(values: Sequence[float | None]) -> list[float | None]:
    """Each with those before it; a step without a value is left out of the mean."""
    means = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - SMOOTHING_STEPS) : end] if value is not None]
        means.append(sum(window) / len(window) if window else None)
    return means


def _before_and_after(axes: Any, found: dict[str, Any], styles: Mapping[str, tuple[str, str]]) -> None:
    """Mean over seeds, and each seed as a thin line."""
    for variant, (colour, marker) in styles.items():
        before, after = found["before"], found["variants"][variant]
        if before and after:
            for value in _values(after):
                axes.plot([0, 1], [before["mean"], value], color=colour, alpha=0.2, lw=1)
            axes.plot([0, 1], [before["mean"], after["mean"]], color=colour, marker=marker, lw=1.8)
    axes.set_xticks([0, 1], ["base", "after training"], fontsize=12)
    axes.set_xlim(-0.25, 1.25)


def _values(estimate: dict[str, Any]) -> list[float]:
    return [value for value in estimate["by_seed"].values() if value is not None]


def _ends(axes: Any, found: dict[str, Any], styles: Mapping[str, tuple[str, str]]) -> None:
    """Mean and interval of each variant, its seeds as small dots, and the base as a dashed line."""
    for position, (variant, (colour, marker)) in enumerate(styles.items()):
        estimate = found["variants"][variant]
        if estimate is None:
            continue
        dots = _values(estimate)
        axes.plot([position + 0.22] * len(dots), dots, ".", color=colour, alpha=0.5, markersize=6)
        reach = None if estimate["low"] is None else [[estimate["mean"] - estimate["low"]]] * 2
        axes.errorbar([position], [estimate["mean"]], yerr=reach, color=colour, marker=marker, capsize=5, markersize=8)
    if found["before"]:
        axes.axhline(found["before"]["mean"], color="grey", linestyle="--", linewidth=1)
        axes.annotate("base", (-0.45, found["before"]["mean"]), color="grey", fontsize=11, va="bottom")
    axes.margins(y=0.12)  # room for the word above the line
    axes.set_xticks(range(len(styles)), styles, fontsize=12)
    axes.set_xlim(-0.5, len(styles) - 0.5)
    axes.set_xlabel("after training, by variant", fontsize=12)
