"""The results of an experiment's finished runs, as sweep.json, README.md and sweep.png."""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pandas import DataFrame

from apo_lora.report.comparison import COMPARED, compare, difference_rows, mean_rows
from apo_lora.report.runs import Run, read_run
from apo_lora.run.curves import curve
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl, read_jsonl, replacing, write_atomically, write_json
from apo_lora.run.tables import aligned, markdown
from apo_lora.sweep.experiment import Experiment, PlannedRun
from apo_lora.sweep.runs import Outcome, is_finished


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _journal(out: Path) -> Path:
    return out / "logs" / "children.jsonl"


def record_child(out: Path, outcome: Outcome) -> None:
    """Adds to the sweep's journal what a child process took."""
    run = {"variant": outcome.run.variant, "seed": outcome.run.seed}
    spent = {"seconds": round(outcome.seconds, 2), "cpu_seconds": round(outcome.cpu_seconds, 2)}
    append_jsonl(_journal(out), [{**run, **spent, "finished": outcome.finished, "ended": now()}])


def spent_by_run(out: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Wall clock and CPU seconds of each finished run, its interrupted parts added up."""
    rows = DataFrame(read_jsonl(_journal(out)) if _journal(out).exists() else ())
    if rows.empty:
        return {}
    spent = rows.groupby(["variant", "seed"])[["seconds", "cpu_seconds", "finished"]].sum()
    return spent[spent.pop("finished") > 0].to_dict("index")


def write_findings(
    name: str, experiment: Experiment, planned: Sequence[PlannedRun], out: Path, overrides: Sequence[str] = ()
) -> dict[str, Any] | None:
    """sweep.json, README.md and sweep.png from the runs that are finished. Returns sweep.json; None if none is."""
    finished = {run: read_run(run.path) for run in planned if is_finished(RunDir(run.path))}
    if not finished:
        return None
    groups = {
        variant: [run for plan, run in finished.items() if plan.variant == variant] for variant in experiment.variants
    }
    recipe = planned[0].recipe.model_dump(mode="json")
    del recipe["train"]["seed"], recipe["output"]["dir"]  # what differs from run to run
    spent = spent_by_run(out)
    findings = {
        "experiment": name,
        "date": now(),
        "cpu_cores": os.cpu_count(),
        "environment": json.loads(RunDir(next(iter(finished)).path).environment.read_text(encoding="utf-8")),
        "overrides": list(overrides),
        "variants": {variant: changes or {} for variant, changes in experiment.variants.items()},
        "baseline": next(iter(experiment.variants)),
        "seeds": list(experiment.seeds),
        "final_steps": experiment.final_steps,
        "recipe": recipe,
        "figures": compare(groups, experiment.final_steps),
        "runs": [
            {
                "variant": run.variant,
                "seed": run.seed,
                "finished": run in finished,
                **spent.get((run.variant, run.seed), {"seconds": None, "cpu_seconds": None}),
            }
            for run in planned
        ],
    }
    write_json(out / "sweep.json", findings)
    write_atomically(out / "README.md", readme(findings))
    with replacing(out / "sweep.png") as temporary:
        temporary.write_bytes(picture(groups, findings["figures"]))
    return findings


# --- as text --------------------------------------------------------------------------------------------------------


def tables(findings: dict[str, Any]) -> list[list[Sequence[str]]]:
    """Means and differences, figures down and variants across."""
    rows = (mean_rows(findings["figures"]), difference_rows(findings["figures"], findings["baseline"]))
    return [list(zip(*of_table, strict=True)) for of_table in rows]


def closing_summary(findings: dict[str, Any]) -> str:
    """Both tables and how to read them."""
    words = ["\n".join(aligned(rows, left=range(len(rows[0])))) for rows in tables(findings)]
    return "\n\n".join([*words, _how_to_read(findings)])


def readme(findings: dict[str, Any]) -> str:
    """OUT/README.md."""
    runs = [run for run in findings["runs"] if run["finished"]]
    seconds, cpu_seconds = (sum(run[key] or 0 for run in runs) for key in ("seconds", "cpu_seconds"))
    missing = [f"{run['variant']}/seed-{run['seed']}" for run in findings["runs"] if not run["finished"]]
    means, differences = ("\n".join(markdown(rows)) for rows in tables(findings))
    parts = [
        f"# {findings['experiment']}",
        f"{len(runs)} runs, {len(findings['variants'])} variants at {len(findings['seeds'])} seeds, "
        f"{seconds:,.0f} s of wall clock and {cpu_seconds:,.0f} s of CPU time in total."
        + (f"\nMissing: {', '.join(missing)}." if missing else ""),
        means,
        differences,
        _how_to_read(findings),
        "![The figures by step and at the end](sweep.png)",
        "`sweep.json` contains every number; each `VARIANT/seed-N` is an ordinary run directory.",
    ]
    return "\n\n".join(parts) + "\n"


def _how_to_read(findings: dict[str, Any]) -> str:
    num_intervals = len(COMPARED) * (len(findings["variants"]) - 1)
    return (
        f"Means over seeds with 95 % t intervals. Accuracy and length are measured on held-out items; entropy and KL "
        f"are means over the last {findings['final_steps']} training steps. Differences are paired by seed. "
        f"* the interval excludes 0; of these {num_intervals} intervals, about one in twenty does so by chance."
    )


# --- as a plot ----------------------------------------------------------------------------------------------------


def picture(groups: Mapping[str, Sequence[Run]], figures: dict[str, Any]) -> bytes:
    """A column per figure that was measured: above its course over the steps, or before and after; below where each
    variant ends. PNG."""
    from apo_lora.run.drawing import Line, canvas, draw_changes, draw_curves, draw_ends, legend_below, png

    measured = [compared for compared in COMPARED if any(figures[compared.key]["variants"].values())]
    canvas_, grid = canvas(2, len(measured), size=(3 * len(measured), 7))
    for compared, (above, below) in zip(measured, grid.T, strict=True):
        found = figures[compared.key]
        base = found["before"] and found["before"]["mean"]
        if compared.course:
            curves = [curve([run.steps[compared.course] for run in runs]) for runs in groups.values()]
            lines = [Line(label, place, one) for place, (label, one) in enumerate(zip(groups, curves, strict=True))]
            draw_curves(above, [line for line in lines if not line.curve.empty], markers=True)
            above.set_xlabel("training step")
        else:
            draw_changes(above, found["variants"], base)
        draw_ends(below, found["variants"], base)
        above.set_title(compared.title)
        below.set_xlabel("after training, by variant")
        for axes in (above, below):
            axes.set_ylabel(compared.unit)
    legend_below(canvas_, list(groups))
    return png(canvas_)
