"""Numbers into places of a small SVG: axes, paths, points. page/figures.html draws what stands here."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from apo_lora.report.curves import Curve, Points

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 10, 38
"""Margins of the plotting area."""


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, laid over `start` to `end` of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, most: int = 5, whole: bool = False) -> list[tuple[float, str]]:
        """(place, label)"""
        inside = [tick for tick in _nice(self.low, self.high, most, whole) if self.low <= tick <= self.high]
        return [(self(tick), f"{round(tick, 10):,.10g}".replace("-", "\N{MINUS SIGN}")) for tick in inside]


def _nice(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return list(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1).tick_values(low, high))


@dataclass(frozen=True)
class Series:
    label: str
    style: str
    """CSS classes."""
    path: str = ""
    band: str = ""
    raw: str = ""
    dots: list[tuple[float, float, float]] = field(default_factory=list)
    """(x, y, radius)"""


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    summary: str
    """What it shows, for those who do not see it."""
    series: list[Series]
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    threshold: float | None = None
    """Place of a line that something is compared with."""
    show_legend: bool = True
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def step_chart(
    title: str,
    unit: str,
    curves: Sequence[tuple[str, str, Curve]],
    *,
    value_range: tuple[float, float] | None = None,
    threshold: float | None = None,
    show_legend: bool = True,
) -> Chart | None:
    """Curves (label, style, curve) over optimizer steps; None where no curve has a value."""
    curves = [(label, style, curve) for label, style, curve in curves if curve.line]
    if not curves:
        return None
    steps = [step for _, _, curve in curves for stretch in curve.line for step, _ in stretch]
    x = _x_axis(min(steps), max(steps))
    y = _y_axis(*(value_range or rounded_range([value for _, _, curve in curves for value in curve.values])))
    return Chart(
        title=title,
        unit=unit,
        summary=f"{title} over steps {min(steps)} to {max(steps)}. "
        + " ".join(f"{label or 'All'}: from {c.ends[0]:.3g} to {c.ends[1]:.3g}." for label, _, c in curves),
        series=[
            Series(
                label,
                style,
                path=_path(curve.line, x, y),
                band=_band_path(curve.band, x, y),
                raw=_path(curve.raw, x, y),
            )
            for label, style, curve in curves
        ],
        x_label="step",
        x_ticks=x.ticks(whole=True),
        y_ticks=y.ticks(),
        threshold=None if threshold is None else y(threshold),
        show_legend=show_legend,
    )


def scatter_chart(
    title: str,
    unit: str,
    x_label: str,
    summary: str,
    counts: dict[tuple[float, float], int],
    formula: Points,
    y_range: tuple[float, float],
) -> Chart:
    """Points, each as large as it is frequent, on the curve of a formula."""
    x_values = [x for x, _ in [*counts, *formula]]
    x, y = _x_axis(min(x_values), max(x_values)), _y_axis(*y_range)
    most = max(counts.values(), default=1)
    return Chart(
        title=title,
        unit=unit,
        summary=summary,
        series=[
            Series(
                "completions",
                "colour-0",
                dots=[
                    (x(at), y(value), round(1.5 + 5 * (count / most) ** 0.5, 1))
                    for (at, value), count in sorted(counts.items(), key=lambda item: -item[1])
                ],
            ),
            Series("formula", "thin", path=_path([formula], x, y)),
        ],
        x_label=x_label,
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
    )


def rounded_range(values: Sequence[float]) -> tuple[float, float]:
    """From tick to tick around the values, never empty."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - abs(low) / 2, high + abs(high) / 2 or 1.0
    ticks = _nice(low, high, 4)
    return float(ticks[0]), float(ticks[-1])


def _x_axis(low: float, high: float) -> Axis:
    return Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)


def _y_axis(low: float, high: float) -> Axis:
    return Axis(low, high, HEIGHT - BOTTOM, TOP)


def _path(stretches: Sequence[Points], x: Axis, y: Axis) -> str:
    # A single point is a line of no length, which round caps turn into a dot.
    return " ".join(
        "M" + " L".join(f"{x(at)} {y(value)}" for at, value in stretch) + ("h0" if len(stretch) == 1 else "")
        for stretch in stretches
    )


def _band_path(stretches: Sequence[Sequence[tuple[float, float, float]]], x: Axis, y: Axis) -> str:
    return " ".join(
        "M"
        + " L".join(
            [f"{x(at)} {y(high)}" for at, _, high in stretch] + [f"{x(at)} {y(low)}" for at, low, _ in stretch[::-1]]
        )
        + "Z"
        for stretch in stretches
    )
