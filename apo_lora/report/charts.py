"""The page's charts: a figure over steps per panel, and what DADS and STCR did beside their formulas."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup
from pandas import DataFrame

from apo_lora.report.runs import COMPLETION_KEYS, Row, RunGroup
from apo_lora.run.curves import figure_curve, thinned
from apo_lora.run.drawing import Line, css_classes, draw_counts, draw_curves, rounded_range, small_canvas, svg
from apo_lora.run.figures import SHARE, Panel

Points = list[tuple[float, float]]


class Chart(NamedTuple):
    title: str
    unit: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()
    """(label, CSS classes of its sample) of each line."""


def curve_charts(panels: Sequence[Panel], groups: Sequence[RunGroup]) -> Iterator[Chart]:
    """With one group a panel is a chart. With several each figure has its own, on an axis that the panel's figures
    share, and the lines are the groups."""
    for panel in panels:
        steps = [[run.steps for run in group.runs] for group in groups]
        curves = {name: [thinned(figure_curve(runs, name)) for runs in steps] for name in panel.lines}
        values = [value for of_name in curves.values() for one in of_name for value in one.stack()]
        if not values:
            continue
        value_range = panel.figure.range or rounded_range(values)
        if len(groups) == 1:
            lines = [Line(label, place, curves[name][0]) for place, (name, label) in enumerate(panel.lines.items())]
            charts = {panel.title: lines}
        else:
            charts = {
                f"{panel.title}, {label}".removesuffix(", "): [
                    Line(group.label, group.place, one) for group, one in zip(groups, curves[name], strict=True)
                ]
                for name, label in panel.lines.items()
            }
        for number, (title, lines) in enumerate(charts.items()):
            if lines := [line for line in lines if not line.curve.empty]:
                drawn = _curve_svg(title, lines, value_range, panel.alarm if number == 0 else None)
                legend = [(line.label, css_classes(line.place)) for line in lines if len(groups) == 1 and line.label]
                yield Chart(title, panel.figure.unit, drawn, legend)


def _curve_svg(title: str, lines: Sequence[Line], value_range: tuple[float, float], alarm: float | None) -> Markup:
    figure, axes = small_canvas("step")
    draw_curves(axes, lines, value_range=value_range, alarm=alarm)
    steps = [step for line in lines for step in line.curve.index]
    ends = [(line.label or "All", line.curve["mean"].dropna()) for line in lines]
    words = (f"{label}: from {mean.iloc[0]:.3g} to {mean.iloc[-1]:.3g}." for label, mean in ends)
    return Markup(svg(figure, " ".join([f"{title} over steps {min(steps)} to {max(steps)}.", *words])))


# --- what DADS and STCR did ------------------------------------------------------------------------------------------


class CreditSeen(NamedTuple):
    completions: int
    weights: Counter
    """(group accuracy, KL weight) of completions with a positive advantage, in groups that are partly right."""
    mean_weight: float
    """Over those."""
    multipliers: Counter
    """(excess tokens, multiplier) of wrong completions in groups that have a right one."""
    amplified: int
    """Completions with a multiplier above 1."""
    mean_multiplier: float
    """Over those."""


def credit_seen(groups: Iterable[list[Row]]) -> CreditSeen:
    """Counted from the rows of completions.jsonl, a list per prompt. A mean over nothing is NaN."""
    columns = sorted(COMPLETION_KEYS)
    rows = [
        [group_number, *(row[key] for key in columns)] for group_number, group in enumerate(groups) for row in group
    ]
    seen = DataFrame(rows, columns=["group", *columns]).astype({"correct": bool})
    accuracy = seen.groupby("group")["correct"].transform("mean")
    excess = seen["length"] - seen["length"].where(seen["correct"]).groupby(seen["group"]).transform("mean")
    weighted = seen[(seen["advantage"] > 0) & accuracy.between(0, 1, inclusive="neither")]["kl_weight"]
    multiplied = seen[~seen["correct"] & excess.notna()]["stcr_multiplier"]
    amplified = seen["stcr_multiplier"][seen["stcr_multiplier"] > 1]
    return CreditSeen(
        completions=len(seen),
        weights=Counter(zip(accuracy[weighted.index].round(3), weighted.round(3), strict=True)),
        mean_weight=weighted.mean(),
        # Tokens to two digits, so that many thousand completions are some hundred points.
        multipliers=Counter(
            zip((float(f"{x:.2g}") for x in excess[multiplied.index].round()), multiplied.round(5), strict=True)
        ),
        amplified=len(amplified),
        mean_multiplier=amplified.mean(),
    )


# The curves are drawn through the formulas of apo.py; torch is loaded only where there is something to draw.


def dads_curve(shape: str) -> Points:
    import torch

    from apo_lora.apo import DADS_SHAPES

    accuracies = torch.linspace(0, 1, 51)
    return list(zip(accuracies.tolist(), DADS_SHAPES[shape](accuracies).tolist(), strict=True))


def stcr_curve(base: float, shortest: float, longest: float) -> Points:
    """From `shortest` to `longest` tokens above the mean length of the group's right completions."""
    import torch

    from apo_lora.apo import stcr_multipliers

    # One group: a right completion without length, so that the others' lengths are their excess.
    excesses = torch.linspace(shortest, longest, 101, dtype=torch.float64)
    lengths, correct = torch.cat([torch.zeros(1), excesses]), torch.tensor([1.0] + [0.0] * 101)
    return list(zip(excesses.tolist(), stcr_multipliers(correct, lengths, base)[1:].tolist(), strict=True))


def dads_chart(shape: str, seen: CreditSeen) -> Chart:
    summary = f"{seen.weights.total()} completions; their mean weight is {seen.mean_weight:.3f}."
    drawn = _credit_svg("accuracy of the group", summary, seen.weights, dads_curve(shape), SHARE)
    return Chart("KL weight by group accuracy", "DADS, completions with a positive advantage", drawn, CREDIT_LEGEND)


def stcr_chart(base: float, seen: CreditSeen) -> Chart:
    excesses = [excess for excess, _ in seen.multipliers]
    formula = stcr_curve(base, min(0.0, *excesses), max(1.0, *excesses))
    multipliers = rounded_range([1.0, *(value for _, value in [*formula, *seen.multipliers])])
    summary = f"{seen.multipliers.total()} wrong completions, {seen.amplified} with a multiplier above 1."
    x_label = "tokens above the mean of correct completions"
    drawn = _credit_svg(x_label, summary, seen.multipliers, formula, multipliers)
    return Chart(
        "Multiplier by excess length", "STCR, wrong completions in groups with a correct one", drawn, CREDIT_LEGEND
    )


CREDIT_LEGEND = (("completions", "dot"), ("formula", "thin"))


def _credit_svg(
    x_label: str, summary: str, counts: Counter, formula: Points, value_range: tuple[float, float]
) -> Markup:
    figure, axes = small_canvas(x_label)
    draw_counts(axes, counts, formula)
    axes.set_ylim(value_range)
    return Markup(svg(figure, summary))
