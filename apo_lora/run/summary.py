"""What is said at the end of a run: what changed, where it lies, and what to type next."""

from pathlib import Path
from typing import Any

from apo_lora.run.directory import RunDir

FIGURES = (
    (
        "accuracy (95 % interval)",
        lambda e: f"{e['accuracy']:.3f} ({e['accuracy_95_low']:.2f}-{e['accuracy_95_high']:.2f})",
    ),
    ("tokens when right", lambda e: _number(e["length_correct"], ".0f")),
    ("tokens when wrong", lambda e: _number(e["length_wrong"], ".0f")),
    ("truncated", lambda e: f"{e['truncated']:.3f}"),
    ("well formatted", lambda e: f"{e['well_formatted']:.3f}"),
)


def evaluation_table(evaluation: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(task, figure, before, after) rows; a dash where nothing was measured."""
    before, after = evaluation.get("before", {}), evaluation.get("after", {})
    return [
        (task, label, *(show(measured[task]) if task in measured else "-" for measured in (before, after)))
        for task in before or after
        for label, show in FIGURES
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def closing_words(
    run_dir: RunDir,
    evaluation: dict[str, Any],
    plots: list[Path],
    seconds: float,
    steps: int,
    troubles: dict[str, int],
) -> str:
    """The text. `troubles` are counts of what went wrong on the way, named; zeros are left out."""
    lines = ["", f"{steps} steps, {seconds:.0f} s of training."]
    table = evaluation_table(evaluation)
    width = max((len(label) for _, label, _, _ in table), default=0)
    for position, (task, label, before, after) in enumerate(table):
        if position == 0 or task != table[position - 1][0]:
            lines += ["", f"{task + ' (held out)':<{width}}  {'before':>17}  {'after':>17}"]
        lines.append(f"{label:<{width}}  {before:>17}  {after:>17}")
    if any(troubles.values()):
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in troubles.items() if count)
        lines += ["", f"On the way: {counts}."]
    lines += [
        "",
        f"Adapter      {run_dir.adapter}",
        f"Record       {run_dir.metrics}, {run_dir.completions}",
        f"Model card   {run_dir.model_card}",
        *([f"Plots        {run_dir.plots}/{', '.join(plot.name for plot in plots)}"] if plots else []),
        "",
        "Next:",
        f"  apo-lora report {run_dir.path}    # all of it on one page",
        f"  apo-lora eval {run_dir.path}    # base and tuned on held-out items, greedy, with the difference",
        f"  apo-lora train --recipe {run_dir.recipe} --resume auto train.max_steps={2 * steps}    # go on from here",
        f"  apo-lora train --recipe {run_dir.recipe} apo.dads=null apo.stcr=null output.dir={run_dir.path}-grpo"
        "    # the same as plain GRPO",
    ]
    return "\n".join(lines)
