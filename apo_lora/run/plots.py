"""The curves of a run as PNG files: one table row per picture."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl, replacing


@dataclass(frozen=True)
class Plot:
    file: str
    title: str
    left_label: str
    left: dict[str, tuple[str, str]]
    """Metric to (label, colour), on the left axis."""
    right_label: str = ""
    right: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The same on the right axis, which goes from 0 to 1."""


ALL, RIGHT, WRONG, OTHER = "dimgrey", "tab:blue", "tab:red", "tab:orange"

PLOTS = (
    Plot(
        "reward_accuracy.png",
        "Reward and accuracy",
        "mean reward",
        {"reward": ("reward", ALL)},
        "accuracy",
        {"accuracy": ("accuracy", RIGHT)},
    ),
    Plot(
        "length.png",
        "Length of completions",
        "tokens",
        {"length_correct": ("right", RIGHT), "length_wrong": ("wrong", WRONG)},
    ),
    Plot(
        "entropy.png",
        "Entropy of the policy",
        "nats per token",
        {"entropy": ("all", ALL), "entropy_correct": ("right", RIGHT), "entropy_wrong": ("wrong", WRONG)},
    ),
    Plot(
        "kl_dads.png",
        "KL to the base, and DADS",
        "nats per token",
        {
            "kl": ("KL", ALL),
            "kl_positives": ("KL, positive advantage", RIGHT),
            "kl_negatives": ("KL, others", WRONG),
        },
        "weight of the KL",
        {"dads_weight_positives": ("DADS weight of positives", OTHER)},
    ),
    Plot(
        "zero_variance_groups.png",
        "Groups that teach nothing",
        "fraction of groups",
        {
            "zero_variance_groups": ("no reward variance", ALL),
            "all_right_groups": ("all right", RIGHT),
            "all_wrong_groups": ("all wrong", WRONG),
        },
    ),
)


def write_plots(run_dir: RunDir) -> list[Path]:
    """Draws every plot of the run. Returns the files; none if no step was recorded."""
    rows = _rows(run_dir)
    if not rows:
        return []
    for plot in PLOTS:
        with replacing(run_dir.plots / plot.file) as temporary:
            temporary.write_bytes(_png([plot], rows))
    return [run_dir.plots / plot.file for plot in PLOTS]


def overview(run_dir: RunDir) -> bytes | None:
    """The first four plots in one picture, as PNG; None if no step was recorded."""
    rows = _rows(run_dir)
    return _png(PLOTS[:4], rows, columns=2, dpi=80) if rows else None


def _rows(run_dir: RunDir) -> list[dict]:
    return list(read_jsonl(run_dir.metrics)) if run_dir.metrics.exists() else []


def _png(plots: Sequence[Plot], rows: list[dict], columns: int = 1, dpi: int = 120) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: a figure of our own leaves the state of a notebook alone.
    figure = Figure(figsize=(7 * columns, 4 * len(plots) // columns), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(plots) // columns, columns, squeeze=False).flat
    for plot, part in zip(plots, parts, strict=True):
        _draw(plot, rows, part)
    png = io.BytesIO()
    figure.savefig(png)
    return png.getvalue()


def _draw(plot: Plot, rows: list[dict], figure) -> None:
    axes = figure.add_subplot()
    _curves(axes, plot.left, rows, style="-")
    axes.set(title=plot.title, xlabel="optimizer step", ylabel=plot.left_label)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if plot.right:
        other = axes.twinx()
        _curves(other, plot.right, rows, style="--")
        other.set(ylabel=plot.right_label, ylim=(-0.02, 1.02))
        more_handles, more_labels = other.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _curves(axes, metrics: dict[str, tuple[str, str]], rows: list[dict], style: str) -> None:
    """Each metric as measured (thin) and as a running mean (thick); steps without a value are gaps."""
    for metric, (label, colour) in metrics.items():
        points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, style, color=colour, alpha=0.3, linewidth=1)
        axes.plot(steps, _running_mean(values), style, color=colour, linewidth=2, label=label)


def _running_mean(values: tuple[float, ...], window: int = 5) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
