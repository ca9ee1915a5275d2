"""The summary at the end of a run: what changed, where the results are, and what to run next."""

from itertools import groupby
from pathlib import Path
from typing import Any

from apo_lora.machine.paths import as_word
from apo_lora.recipe.files import override
from apo_lora.run.directory import RunDir
from apo_lora.run.figures import FIGURES, HELD_OUT, format_figure
from apo_lora.run.tables import aligned
from apo_lora.run.validation import best_step, measured


def evaluation_table(evaluation: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(task, figure, before, after) rows; a dash where nothing was measured."""
    before, after = evaluation.get("before", {}), evaluation.get("after", {})
    return [
        (task, _label(name), *(_measured(of_task.get(task, {}), name) for of_task in (before, after)))
        for task in before or after
        for name in HELD_OUT
    ]


def _best(run_dir: RunDir) -> list[str]:
    accuracies = measured(run_dir)
    if not (accuracies and run_dir.adapter_best.is_dir()):
        return []
    step = best_step(accuracies)
    return [f"Best adapter {run_dir.adapter_best} (step {step}, held-out accuracy {accuracies[step]:.3f})"]


def _label(name: str) -> str:
    return FIGURES[name].label + (" (95 % interval)" if name == "accuracy" else "")


def _measured(figures: dict[str, Any], name: str) -> str:
    interval = f" ({figures['accuracy_95_low']:.2f}-{figures['accuracy_95_high']:.2f})" if figures else ""
    return format_figure(name, figures.get(name)) + (interval if name == "accuracy" else "")


def closing_summary(
    run_dir: RunDir,
    evaluation: dict[str, Any],
    plots: list[Path],
    seconds: float,
    steps: int,
    troubles: dict[str, int],
) -> str:
    """The text. `troubles` are counts of what went wrong on the way, named; zeros are left out."""
    lines = ["", f"{steps} steps, {seconds:.0f} s of training."]
    for task, rows in groupby(evaluation_table(evaluation), key=lambda row: row[0]):
        lines += ["", *aligned([(f"{task} (held out)", "before", "after"), *(row[1:] for row in rows)])]
    if any(troubles.values()):
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in troubles.items() if count)
        lines += ["", f"During training: {counts}."]
    recipe, elsewhere = as_word(run_dir.recipe), as_word(override("output.dir", f"{run_dir.path}-grpo"))
    lines += [
        "",
        f"Adapter      {run_dir.adapter}",
        *_best(run_dir),
        f"Record       {run_dir.metrics}, {run_dir.completions}",
        f"Model card   {run_dir.model_card}",
        *([f"Plots        {run_dir.plots}/{', '.join(plot.name for plot in plots)}"] if plots else []),
        "",
        "Next:",
        f"  apo-lora report {as_word(run_dir.path)}    # all results on one page",
        f"  apo-lora eval {as_word(run_dir.path)}    # base and tuned model on held-out items, decoded greedily",
        f"  apo-lora train --recipe {recipe} --resume auto train.max_steps={2 * steps}    # continue from here",
        f"  apo-lora train --recipe {recipe} apo.dads=null apo.stcr=null {elsewhere}    # the same as plain GRPO",
    ]
    return "\n".join(lines)
