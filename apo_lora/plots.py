"""The curves of a run as PNG files: one table row per picture."""

from dataclasses import dataclass
from pathlib import Path

from apo_lora.run_dir import RunDir, read_jsonl


@dataclass(frozen=True)
class Plot:
    file: str
    title: str
    left: dict[str, str]
    """Metric to label, on the left axis."""
    left_label: str
    right: dict[str, str]
    right_label: str = ""


PLOTS = (
    Plot(
        "reward_accuracy.png",
        "Reward and accuracy",
        {"reward": "reward (mean)"},
        "reward",
        {"accuracy": "accuracy"},
        "accuracy",
    ),
    Plot(
        "length.png",
        "Length of completions",
        {"length_correct": "right", "length_wrong": "wrong"},
        "tokens",
        {},
    ),
    Plot(
        "entropy.png",
        "Entropy of the policy",
        {"entropy": "all", "entropy_correct": "right", "entropy_wrong": "wrong"},
        "nats per token",
        {},
    ),
    Plot(
        "kl_dads.png",
        "KL to the base, and DADS",
        {"kl": "KL", "kl_positives": "KL, positives", "kl_negatives": "KL, others"},
        "nats per token",
        {"dads_weight_positives": "DADS weight of positives"},
        "weight",
    ),
    Plot(
        "zero_variance_groups.png",
        "Groups that teach nothing",
        {"zero_variance_groups": "no variance", "all_right_groups": "all right", "all_wrong_groups": "all wrong"},
        "fraction of groups",
        {},
    ),
)


def write_plots(run_dir: RunDir) -> list[Path]:
    """Draws every plot of the run. Returns the files; none if no step was recorded."""
    rows = list(read_jsonl(run_dir.metrics)) if run_dir.metrics.exists() else []
    if not rows:
        return []
    run_dir.plots.mkdir(exist_ok=True)
    return [_draw(plot, rows, run_dir.plots / plot.file) for plot in PLOTS]


def _draw(plot: Plot, rows: list[dict], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: a figure of our own leaves the state of a notebook alone.
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _curves(axes, plot.left, rows, colours=("C0", "C3", "C7"), style="-")
    axes.set(title=plot.title, xlabel="optimizer step", ylabel=plot.left_label)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if plot.right:
        other = axes.twinx()
        _curves(other, plot.right, rows, colours=("C1",), style="--")
        other.set(ylabel=plot.right_label, ylim=(-0.02, 1.02))
        more_handles, more_labels = other.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)
    return path


def _curves(axes, metrics: dict[str, str], rows: list[dict], colours: tuple[str, ...], style: str) -> None:
    """Each metric as measured (thin) and as a running mean (thick); steps without a value are gaps."""
    for (metric, label), colour in zip(metrics.items(), colours, strict=False):
        points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, style, color=colour, alpha=0.3, linewidth=1)
        axes.plot(steps, _running_mean(values), style, color=colour, linewidth=2, label=label)


def _running_mean(values: tuple[float, ...], window: int = 5) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
