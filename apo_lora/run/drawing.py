"""All that is drawn of runs, by matplotlib: PNG for files and notebooks, SVG for the report's page.

Nothing here uses pyplot: separate figures leave the state of a notebook unchanged.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from pandas import DataFrame

# After Okabe and Ito, told apart by every kind of colour vision: on light paper and on dark. Dashes and markers say it
# once more.
COLOURS = (
    ("#0069b4", "#6db8f0"), ("#c04a00", "#ff9a5c"), ("#007d5a", "#3fcf9f"),
    ("#a8488a", "#e69ac8"), ("#866200", "#e8c04a"), ("#5a5c62", "#a6a8ae"),
)  # fmt: skip
DASHES = ((), (7, 3), (2, 2.5), (9, 3, 2, 3), (4, 2, 2, 2, 2, 2), (14, 4))
MARKERS = "os^DvPX"
INK, QUIET, RULE, ALARM = "#1c1d20", "#5a5c62", "#d9d9d3", "#a83200"
CSS_COLOURS = {light: f"var(--colour-{place})" for place, (light, _) in enumerate(COLOURS)} | {
    INK: "var(--ink)", QUIET: "var(--quiet)", RULE: "var(--rule)", ALARM: "var(--bad)"
}  # fmt: skip
"""What a colour becomes in SVG, where the page decides between light and dark."""

SVG_SIZE = (380, 230)


class Line(NamedTuple):
    label: str
    place: int
    """Among the lines of its picture: decides colour, dashes and marker."""
    curve: DataFrame
    """As curves.curve makes it."""


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)][0]


def _dash_place(place: int) -> int:
    """No two of the first 36 places have both their colour and their dashes in common, of 6 neither."""
    return (place + place // len(COLOURS)) % len(DASHES)


def _marker(place: int) -> str:
    return MARKERS[place % len(MARKERS)]


def css_classes(place: int) -> str:
    return f"colour-{place % len(COLOURS)} dash-{_dash_place(place)}"


def css() -> str:
    """The style sheet's part: the colours as variables, and the classes of a legend's samples."""
    variables = " ".join(f"--colour-{n}: light-dark({light}, {dark});" for n, (light, dark) in enumerate(COLOURS))
    colours = (f".colour-{n} {{ color: var(--colour-{n}); }}" for n in range(len(COLOURS)))
    dashes = (f".dash-{n} {{ stroke-dasharray: {' '.join(map(str, dash))}; }}" for n, dash in enumerate(DASHES) if dash)
    return "\n".join([f":root {{ {variables} }}", *colours, *dashes, ""])


# --- pictures --------------------------------------------------------------------------------------------------------


def plot_grid(rows: int, columns: int) -> tuple[Canvas, Any]:
    """A figure for PNG of plots of 5.5 x 3.6 inches with their labels, and its axes as a (rows, columns) array.

    Margins are fixed: measuring every label for a layout takes half the time of a picture, and each run draws six.
    """
    width, height, left, right, bottom, top = 5.5, 3.6, 0.8, 0.15, 0.5, 0.35
    margins = {
        "left": left / (width * columns),
        "right": 1 - right / (width * columns),
        "bottom": bottom / (height * rows),
        "top": 1 - top / (height * rows),
        "wspace": (left + right) / (width - left - right),
        "hspace": (bottom + top) / (height - bottom - top),
    }
    return _canvas(rows, columns, (width * columns, height * rows), gridspec_kw=margins)


def canvas(rows: int, columns: int, size: tuple[float, float], dpi: int = 100) -> tuple[Canvas, Any]:
    """A figure for PNG, `size` in inches, laid out by its labels, and its axes as a (rows, columns) array."""
    return _canvas(rows, columns, size, dpi, layout="constrained")


def _canvas(
    rows: int, columns: int, size: tuple[float, float], dpi: int = 100, layout: str | None = None, **options: Any
) -> tuple[Canvas, Any]:
    figure = Canvas(figsize=size, dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for one in axes.flat:
        one.grid(color=RULE, linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def png(figure: Canvas) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def small_canvas(x_label: str) -> tuple[Canvas, Any]:
    """A figure for SVG and its axes: ticks on quiet horizontal rules, and no frame. One unit is a pixel of the page."""
    width, height = SVG_SIZE
    figure = Canvas(figsize=(width / 72, height / 72))
    figure.patch.set_visible(False)
    axes = figure.add_axes((48 / width, 38 / height, (width - 68) / width, (height - 48) / height), frameon=False)
    axes.tick_params(length=0, pad=6, labelsize=11, labelcolor=QUIET, bottom=False, left=False)
    axes.set_xlabel(x_label, loc="right", fontsize=11, color=QUIET)
    axes.grid(axis="y", color=RULE, linewidth=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    return figure, axes


def svg(figure: Canvas, summary: str) -> str:
    """The figure as an element of a page, with `summary` for those who do not see it.

    It carries no style and no id: the page's Content-Security-Policy forbids the one, other figures may have the other.
    """
    content = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(content, format="svg")
    root = ElementTree.fromstring(content.getvalue())
    element = _bare(root)
    element.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": summary}
    return ElementTree.tostring(element, encoding="unicode")


_DROPPED = {"metadata", "defs"}
_KEPT = ("d", "x", "y", "transform")
_LONG_NUMBER = re.compile(r"-?\d+\.\d\d+")


def _bare(element: ElementTree.Element) -> ElementTree.Element:
    """Styles as attributes with the page's colours, ids as classes, numbers to four digits; no namespaces."""
    attributes = {name: element.attrib[name] for name in _KEPT if name in element.attrib}
    for declaration in filter(None, element.get("style", "").split(";")):
        name, value = map(str.strip, declaration.split(":", 1))
        if not name.startswith("font"):
            attributes[name] = CSS_COLOURS.get(value, value)
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    if not element.get("id", "0")[-1].isdigit():  # one of ours; matplotlib's own are numbered
        attributes["class"] = element.attrib["id"]
    attributes = {k: _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.4g}", v) for k, v in attributes.items()}
    if "d" in attributes:
        attributes["d"] = _one_line(attributes["d"])
    bare = ElementTree.Element(_name(element), attributes)
    bare.text = (element.text or "").strip()
    bare.extend(_bare(child) for child in element if _name(child) not in _DROPPED)
    return bare


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _one_line(path: str) -> str:
    # A stretch of a single point is a line of no length, which round caps turn into a dot.
    return re.sub(r"(M [\d.-]+ [\d.-]+)(?= M|$)", r"\1 h 0", " ".join(path.split()))


def legend_below(figure: Canvas, labels: Sequence[str]) -> None:
    """One legend for all axes: a label per place."""
    samples = [
        Line2D([], [], color=colour(place), marker=_marker(place), label=label) for place, label in enumerate(labels)
    ]
    figure.legend(handles=samples, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=13)


# --- what is in them -------------------------------------------------------------------------------------------------


def draw_curves(
    axes: Any,
    lines: Sequence[Line],
    *,
    value_range: tuple[float, float] | None = None,
    alarm: float | None = None,
    markers: bool = False,
) -> None:
    """Lines over optimizer steps: thick the running mean; thin what was measured, or a band from lowest to highest."""
    if not lines:
        return
    for label, place, curve in lines:
        style = {"color": colour(place), "solid_capstyle": "round", "clip_on": False}
        if "raw" in curve:
            axes.plot(curve.index, curve["raw"], linewidth=1, alpha=0.35, gid="raw", **style)
        else:
            band = {"color": colour(place), "alpha": 0.16, "gid": "band", "clip_on": False}
            # Two widths: with one of everything, SVG would get the outline as a marker to be used, under an id.
            axes.fill_between(curve.index, curve["low"], curve["high"], linewidth=[0, 0], **band)
        if markers:
            style |= {"marker": _marker(place), "markevery": max(1, len(curve) // 6)}
        else:
            dashes = DASHES[_dash_place(place)]
            style["linestyle"] = (0, tuple(length / 2 for length in dashes)) if dashes else "-"  # in line widths
        axes.plot(curve.index, curve["mean"], linewidth=2, label=label or None, gid="line", **style)
    steps = [step for line in lines for step in line.curve.index]
    axes.set_xlim(min(steps), max(max(steps), min(steps) + 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if value_range:
        axes.set_ylim(value_range)
    if alarm is not None:
        axes.axhline(alarm, color=ALARM, linewidth=1, linestyle=(0, (2, 3)))
        at_the_left = {"xycoords": axes.get_yaxis_transform(), "xytext": (2, 3), "textcoords": "offset points"}
        axes.annotate("alarm", (0, alarm), color=ALARM, fontsize=11, **at_the_left)


def draw_counts(axes: Any, counts: Mapping[tuple[float, float], int], formula: Sequence[tuple[float, float]]) -> None:
    """Points, each as large as it is frequent, on the curve of a formula."""
    most = max(counts.values())
    points = sorted(counts, key=counts.__getitem__, reverse=True)
    widths = [3 + 10 * (counts[point] / most) ** 0.5 for point in points]
    dots = [(point, point) for point in points]  # lines of no length with round caps: the shortest that SVG has
    axes.add_collection(
        LineCollection(
            dots, linewidths=widths, colors=colour(0), capstyle="round", alpha=0.6, gid="dots", clip_on=False
        )
    )
    axes.plot(*zip(*formula, strict=True), color=INK, linewidth=1, gid="line")
    x_values = [x for x, _ in [*points, *formula]]
    axes.set_xlim(min(x_values), max(x_values))


def draw_ends(axes: Any, ends: Mapping[str, Mapping[str, Any] | None], base: float | None) -> None:
    """Per variant its mean with the interval and, beside it, each seed; before training is a dashed line.

    `ends` holds what comparison.compare says of each variant.
    """
    for place, end in enumerate(ends.values()):
        if end is None:
            continue
        dots = seeds_of(end)
        axes.plot([place + 0.22] * len(dots), dots, ".", color=colour(place), alpha=0.5, markersize=6)
        reach = None if end["low"] is None else [[end["mean"] - end["low"]], [end["high"] - end["mean"]]]
        style = {"color": colour(place), "marker": _marker(place), "markersize": 8, "capsize": 5}
        axes.errorbar([place], [end["mean"]], yerr=reach, **style)
    if base is not None:
        axes.axhline(base, color=QUIET, linestyle="--", linewidth=1)
        axes.annotate("before", (-0.45, base), color=QUIET, fontsize=11, va="bottom")
    axes.margins(y=0.12)  # room for the word above the line
    axes.set_xticks(range(len(ends)), ends)
    axes.set_xlim(-0.5, len(ends) - 0.5)


def draw_changes(axes: Any, ends: Mapping[str, Mapping[str, Any] | None], base: float | None) -> None:
    """From before training to each variant's mean, and thin to each of its seeds."""
    for place, end in enumerate(ends.values()):
        if end is None or base is None:
            continue
        for value in seeds_of(end):
            axes.plot([0, 1], [base, value], color=colour(place), alpha=0.2, linewidth=1)
        axes.plot([0, 1], [base, end["mean"]], color=colour(place), marker=_marker(place), linewidth=2)
    axes.set_xticks([0, 1], ["before", "after training"])
    axes.set_xlim(-0.25, 1.25)


def seeds_of(end: Mapping[str, Any]) -> list[float]:
    return [value for value in end["by_seed"].values() if value is not None]


def rounded_range(values: Sequence[float]) -> tuple[float, float]:
    """From tick to tick around the values, never empty."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - abs(low) / 2, high + abs(high) / 2 or 1.0
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1).tick_values(low, high)
    return float(ticks[0]), float(ticks[-1])
