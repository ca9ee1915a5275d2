"""The curves of a run as PNG."""

from collections.abc import Sequence
from pathlib import Path

from pandas import DataFrame

from apo_lora.run.curves import figure_curve, read_steps
from apo_lora.run.directory import RunDir
from apo_lora.run.drawing import Line, draw_curves, plot_grid, png
from apo_lora.run.figures import CURVES, PLOTS, Panel
from apo_lora.run.files import replacing


def write_plots(run_dir: RunDir) -> list[Path]:
    """Draws every plot of the run. Returns the files; none if no step was recorded."""
    steps = read_steps(run_dir)
    if steps.empty:
        return []
    measured = {name: panels for name, panels in PLOTS.items() if _measured(panels, steps)}
    for name, panels in measured.items():
        with replacing(run_dir.plots / name) as temporary:
            temporary.write_bytes(_picture(panels, steps, columns=len(panels)))
    return [run_dir.plots / name for name in measured]


def overview(run_dir: RunDir) -> bytes | None:
    """The report's curves in one image, as PNG; None if no step was recorded."""
    steps = read_steps(run_dir)
    return None if steps.empty else _picture(_measured(CURVES, steps), steps, columns=3)


def _measured(panels: Sequence[Panel], steps: DataFrame) -> list[Panel]:
    return [panel for panel in panels if steps[list(panel.lines)].notna().any(axis=None)]


def _picture(panels: Sequence[Panel], steps: DataFrame, columns: int) -> bytes:
    figure, grid = plot_grid(-(-len(panels) // columns), columns)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for panel, axes in zip(panels, grid.flat, strict=False):
        axes.set(title=panel.title, xlabel="optimizer step", ylabel=panel.figure.unit)
        lines = [
            Line(label, place, figure_curve([steps], name)) for place, (name, label) in enumerate(panel.lines.items())
        ]
        lines = [line for line in lines if not line.curve.empty]
        draw_curves(axes, lines, value_range=panel.figure.range, alarm=panel.alarm)
        if len(lines) > 1:
            axes.legend(frameon=False)
    return png(figure)
