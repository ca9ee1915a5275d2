"""The page's charts: a figure over steps per panel, and what DADS and STCR did beside their formulas."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from apo_lora.report.credit import CreditSeen, Points, dads_curve, stcr_curve
from apo_lora.report.groups import Group
from apo_lora.run.curves import figure_curve, thinned
from apo_lora.run.drawing import Line, css_classes, draw_counts, draw_curves, rounded_range, small_canvas, svg
from apo_lora.run.figures import SHARE, Panel


class Chart(NamedTuple):
    title: str
    unit: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()
    """(label, CSS classes of its sample) of each line."""


def curve_charts(panels: Sequence[Panel], groups: Sequence[Group]) -> Iterator[Chart]:
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


def dads_chart(shape: str, seen: CreditSeen) -> Chart:
    return Chart(
        "KL weight by group accuracy",
        "DADS, completions with a positive advantage",
        _credit_svg(
            "accuracy of the group",
            f"{seen.weights.total()} completions; their mean weight is {seen.mean_weight:.3f}.",
            seen.weights,
            dads_curve(shape),
            SHARE,
        ),
        CREDIT_LEGEND,
    )


def stcr_chart(base: float, seen: CreditSeen) -> Chart:
    excesses = [excess for excess, _ in seen.multipliers]
    formula = stcr_curve(base, min(0.0, *excesses), max(1.0, *excesses))
    return Chart(
        "Multiplier by excess length",
        "STCR, wrong completions in groups with a correct one",
        _credit_svg(
            "tokens above the mean of correct completions",
            f"{seen.multipliers.total()} wrong completions, {seen.amplified} with a multiplier above 1.",
            seen.multipliers,
            formula,
            rounded_range([1.0, *(value for _, value in [*formula, *seen.multipliers])]),
        ),
        CREDIT_LEGEND,
    )


CREDIT_LEGEND = (("completions", "dot"), ("formula", "thin"))


def _credit_svg(
    x_label: str,
    summary: str,
    counts: Mapping[tuple[float, float], int],
    formula: Points,
    value_range: tuple[float, float],
) -> Markup:
    figure, axes = small_canvas(x_label)
    draw_counts(axes, counts, formula)
    axes.set_ylim(value_range)
    return Markup(svg(figure, summary))
