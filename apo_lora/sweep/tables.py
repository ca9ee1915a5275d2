"""The findings in words: a table for the screen and the same as Markdown. Both read sweep.json's content alone."""

from collections.abc import Sequence
from typing import Any

from apo_lora.sweep.figures import FIGURES


def estimate_words(estimate: dict[str, Any] | None, form: str, *, signed: bool = False) -> str:
    """`0.871 (0.85 to 0.89)`; a dash for nothing, no interval for a single seed."""
    if estimate is None:
        return "-"
    form = "+" + form if signed else form
    words = format(estimate["mean"], form)
    if estimate["low"] is None:
        return words
    return f"{words} ({format(estimate['low'], form)} to {format(estimate['high'], form)})"


def mean_rows(findings: dict[str, Any]) -> list[list[str]]:
    """Heading, the base, then a row per variant: mean and 95 % interval of every figure."""
    found = findings["figures"]
    rows = [["", *(figure.title for figure in FIGURES)]]
    rows.append(["base", *(estimate_words(found[f.key]["before"], f.form) for f in FIGURES)])
    for variant in findings["variants"]:
        rows.append([variant, *(estimate_words(found[f.key]["variants"][variant], f.form) for f in FIGURES)])
    return rows


def difference_rows(findings: dict[str, Any]) -> list[list[str]]:
    """The differences to the baseline, by seed; a star where the interval leaves out 0."""
    rows = [[f"minus {findings['baseline']}", *(figure.title for figure in FIGURES)]]
    for variant in findings["variants"]:
        if variant == findings["baseline"]:
            continue
        row = [variant]
        for figure in FIGURES:
            estimate = findings["figures"][figure.key]["differences"][variant]
            star = " *" if estimate and estimate["excludes_zero"] else ""
            row.append(estimate_words(estimate, figure.form, signed=True) + star)
        rows.append(row)
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def transposed(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Figures down, variants across: narrower, for the screen."""
    return [list(column) for column in zip(*rows, strict=True)]


def closing_words(findings: dict[str, Any]) -> str:
    """Both tables and how to read them."""
    tables = (mean_rows(findings), difference_rows(findings))
    return "\n\n".join([*(aligned(transposed(rows)) for rows in tables), _how_to_read(findings)])


def report(findings: dict[str, Any]) -> str:
    """OUT/README.md."""
    runs = [run for run in findings["runs"] if run["finished"]]
    seconds, cpu_seconds = (sum(run[key] or 0 for run in runs) for key in ("seconds", "cpu_seconds"))
    missing = [f"{run['variant']}/seed-{run['seed']}" for run in findings["runs"] if not run["finished"]]
    lines = [
        f"# {findings['experiment']}",
        "",
        f"{len(runs)} runs, {len(findings['variants'])} variants at {len(findings['seeds'])} seeds, "
        f"{seconds:,.0f} s of wall clock and {cpu_seconds:,.0f} CPU s added up.",
        *([f"Missing: {', '.join(missing)}."] if missing else []),
        "",
        markdown(transposed(mean_rows(findings))),
        "",
        markdown(transposed(difference_rows(findings))),
        "",
        _how_to_read(findings),
        "",
        "![The figures by step and at the end](sweep.png)",
        "",
        "`sweep.json` holds every number; each `VARIANT/seed-N` here is an ordinary run.",
    ]
    return "\n".join(lines) + "\n"


def _how_to_read(findings: dict[str, Any]) -> str:
    num_intervals = len(FIGURES) * (len(findings["variants"]) - 1)
    return (
        f"Means over seeds with 95 % t intervals. Accuracies and lengths are of held-out items; entropy and KL are "
        f"means over the last {findings['final_steps']} training steps. Differences are taken seed by seed. "
        f"* the interval leaves out 0; of {num_intervals} such intervals about one in twenty does so by chance."
    )
