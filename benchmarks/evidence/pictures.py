"""The experiments' results, drawn. Bars are 95 % intervals over seeds, dots are seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from apo_lora.run.drawing import MARKERS, QUIET, canvas, colour, draw_ends, png


def ends(found: dict[str, Any], keys: Sequence[str], caption: str) -> bytes:
    """A panel per figure: where each variant ends. PNG."""
    figure, axes = canvas(1, len(keys), size=(4 * len(keys), 5.2))
    for key, one in zip(keys, axes.flat, strict=True):
        measured = found[key]
        draw_ends(one, measured["variants"], measured["before"] and measured["before"]["mean"])
        one.tick_params(axis="x", rotation=60)
        one.set_title(measured["title"])
        one.set_ylabel(measured["unit"])
    figure.supxlabel(caption, fontsize=11, color=QUIET)
    return png(figure)


Series = Mapping[str, Sequence[tuple[float, str]]]
"""Label to (beta, variant), in order of beta."""


def frontier(found: dict[str, Any], series: Series, caption: str) -> bytes:
    """Left, what is learned against what is kept, a point per beta and a curve per series; right, all by beta. PNG."""
    figure, ((front, *by_beta),) = canvas(1, 5, size=(22, 5.4))
    for place, (label, points) in enumerate(series.items()):
        style = {"color": colour(place), "marker": MARKERS[place], "capsize": 3, "linewidth": 1.5, "label": label}
        hard, general = (_columns(found[key], points) for key in ("hard", "general"))
        front.errorbar(hard[0], general[0], xerr=hard[1], yerr=general[1], alpha=0.85, **style)
        for (beta, _), x, y in zip(points, hard[0], general[0], strict=True):
            if place == 0:  # the others' points lie beside these
                front.annotate(f"{beta:g}", (x, y), color=QUIET, textcoords="offset points", xytext=(8, 6))
        for key, axes in zip(("hard", "general", "kl", "entropy"), by_beta, strict=True):
            means, reach = _columns(found[key], points)
            # Side by side, so that equal values do not hide each other; a beta of 0 has no place on a log scale.
            betas = [(beta or 0.0025) * (0.92, 1.0, 1.09)[place] for beta, _ in points]
            axes.errorbar(betas, means, yerr=reach, **style)
    front.set(title="Learned against kept, by beta", xlabel=found["hard"]["title"], ylabel=found["general"]["title"])
    for key, axes in zip(("hard", "general", "kl", "entropy"), by_beta, strict=True):
        axes.set_xscale("log")
        ticks = sorted({beta for points in series.values() for beta, _ in points})
        axes.set_xticks([beta or 0.0025 for beta in ticks], [f"{beta:g}" for beta in ticks])
        axes.minorticks_off()
        axes.set(title=found[key]["title"], xlabel="beta", ylabel=found[key]["unit"])
        if found[key]["before"]:
            axes.axhline(found[key]["before"]["mean"], color=QUIET, linestyle="--", linewidth=1)
    handles, labels = front.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=13)
    figure.supxlabel(caption, fontsize=11, color=QUIET)
    return png(figure)


def _columns(measured: dict[str, Any], points: Sequence[tuple[float, str]]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far the intervals reach below and above."""
    ends_ = [measured["variants"][variant] for _, variant in points]
    means = [end["mean"] for end in ends_]
    below = [end["mean"] - end["low"] if end["low"] is not None else 0.0 for end in ends_]
    above = [end["high"] - end["mean"] if end["high"] is not None else 0.0 for end in ends_]
    return means, [below, above]
