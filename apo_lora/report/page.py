"""The verb `apo-lora report`: runs in, one HTML file out, which loads nothing from the network."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from tqdm.auto import tqdm

from apo_lora import __version__
from apo_lora.errors import RunDirError
from apo_lora.evaluation.figures import AnswerPair, paired
from apo_lora.evaluation.gallery import MOST_BYTES, AnswerSource, gallery, page_file, page_head, readable
from apo_lora.report.charts import credit_seen, curve_charts, dads_chart, stcr_chart
from apo_lora.report.comparison import COMPARED, HEADINGS, Compared, compare, difference_rows, format_interval
from apo_lora.report.cost import cost
from apo_lora.report.recomputed import recomputed_credit
from apo_lora.report.runs import (
    OWN_ANSWERS,
    Run,
    RunGroup,
    answer_files,
    differences,
    grouped,
    prompt_groups,
    read_answers,
    read_runs,
)
from apo_lora.run.directory import RunDir
from apo_lora.run.drawing import css
from apo_lora.run.figures import CURVES, SIGNAL_CURVES, format_figure
from apo_lora.run.files import write_atomically
from apo_lora.run.learning_signal import verdict
from apo_lora.run.summary import evaluation_table

GENERATOR = "apo-lora report"

FINAL_STEPS = 5
"""Over which entropy and KL at the end of training are means."""

TRAINING_GROUPS = 24
"""Prompts of the last steps that are shown."""


class Written(NamedTuple):
    path: Path
    credit: Mapping[str, str]
    """By the name of each run: whether its credit, recomputed, is that of the record."""


def report(paths: Sequence[str], out: str | None = None) -> Written:
    """Writes the page to `out`, else to report.html in the run, or here where there are several.

    Raises RunDirError before anything is written. An earlier report is replaced, no other file is.
    """
    target = Path(out) if out else RunDir(paths[0] if len(paths) == 1 else "").report
    _check(target)
    runs = read_runs(paths)
    credit = recomputed_by_run(runs)
    page = readable(render(runs, credit))
    try:
        write_atomically(target, page)
    except OSError as error:
        raise RunDirError(f"{target}: cannot be written ({error.strerror}); choose another with --out") from None
    return Written(target, credit)


def _check(target: Path) -> None:
    if target.suffix.lower() not in (".html", ".htm"):
        raise RunDirError(f"--out {target}: must end in .html; give another name")
    if target.is_dir():
        raise RunDirError(f"--out {target}: is a folder; give the name of a file")
    if target.exists() and GENERATOR not in target.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise RunDirError(f"{target}: already exists and is not a report; choose another with --out FILE.html")


# --- the page --------------------------------------------------------------------------------------------------------


def recomputed_by_run(runs: Sequence[Run]) -> dict[str, str]:
    return {run.name: recomputed_credit(run).text for run in tqdm(runs, "recomputing credit", delay=2, leave=False)}


def render(runs: Sequence[Run], credit: Mapping[str, str] | None = None) -> str:
    """The whole page, under MOST_BYTES. Raises RunDirError where even a page without gallery is too large.

    `credit`: as recomputed_by_run gives it.
    """
    groups = grouped(runs)
    content = {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        "runs": runs,
        "groups": groups,
        "evaluation": evaluation_table(runs[0].evaluation) if len(runs) == 1 else [],
        "columns": HEADINGS,
        "group_rows": [_result_row(group.label, group.style, group.runs) for group in groups],
        "run_rows": [_result_row(run.name, "", [run]) for group in groups for run in group.runs],
        "seed_differences": _seed_differences(groups),
        "differences": differences([group.recipe for group in groups]),
        "curves": list(curve_charts(CURVES, groups)),
        "signal_curves": list(curve_charts(SIGNAL_CURVES, groups)),
        "signal": [_signal(run) for group in groups for run in group.runs],
        "costs": [(group, cost(group.runs)) for group in groups],
        "credit": [_credit(group) for group in tqdm(groups, "reading completions", delay=2, leave=False)],
        "recomputed": recomputed_by_run(runs) if credit is None else credit,
        "record": [_record(group) for group in groups],
    }
    size = len(_filled(content, Markup()).encode("utf-8", "replace"))
    room = MOST_BYTES - size - 100_000  # for what stands around the items
    if room < 0:
        raise RunDirError(
            f"report: a page of {len(runs)} runs is too large ({size / 1e6:.1f} MB without answers); give fewer runs"
        )
    answers = [source for run in runs for source in _answer_sources(run, [] if len(runs) == 1 else [run.name])]
    return _filled(content, gallery(answers, room))


def _filled(content: dict[str, Any], completions: Markup) -> str:
    environment = Environment(
        loader=PackageLoader("apo_lora.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own_style = files("apo_lora.report").joinpath("page", "style.css").read_text(encoding="utf-8")
    style = page_file("page.css") + Markup(css()) + page_file("gallery.css") + Markup(own_style)
    script = page_file("gallery.js")
    head = page_head(content["title"], f"{GENERATOR} {__version__}", style, script)
    return environment.get_template("report.html").render(**content, completions=completions, script=script, head=head)


def _result_row(label: str, style: str, runs: Sequence[Run]) -> dict[str, Any]:
    """A row of the results: per compared figure `(value, interval)`, of held-out items each before → after training."""
    found = compare({label: runs}, FINAL_STEPS)
    return {
        "label": label,
        "style": style,
        "seeds": ", ".join(str(run.seed) for run in runs),
        "progress": "; ".join(dict.fromkeys(run.progress for run in runs)),
        "cells": {c.key: _cell(c, found[c.key]["before"], found[c.key]["variants"][label], runs) for c in COMPARED},
    }


def _cell(compared: Compared, before: Any, after: Any, runs: Sequence[Run]) -> tuple[str, str]:
    values, intervals = [], []
    for when, estimate in (("before", before), ("after", after)) if compared.task else (("after", after),):
        values.append(format_figure(compared.name, estimate and estimate["mean"]))
        if len(runs) == 1 and compared.name == "accuracy":  # one run's items have an interval of their own
            measured = runs[0].evaluation.get(when, {}).get(compared.task, {})
            estimate = measured and {"low": measured["accuracy_95_low"], "high": measured["accuracy_95_high"]}
        if estimate and estimate["low"] is not None:
            intervals.append(format_interval(estimate, compared.name))
    return " → ".join(values), " → ".join(intervals)


def _seed_differences(groups: Sequence[RunGroup]) -> list[list[str]]:
    """The groups' differences to the first; empty where they share no seed."""
    if len(groups) == 1:
        return []
    rows = difference_rows(compare({group.label: group.runs for group in groups}, FINAL_STEPS), groups[0].label)
    return rows if any(cell != "-" for row in rows[1:] for cell in row[1:]) else []


def _signal(run: Run) -> dict[str, Any]:
    """The share of groups with reward variance over all steps, and what that means."""
    shares = run.steps["zero_variance_groups"].dropna()
    return {"run": run.name, "share": None if shares.empty else 1 - shares.mean(), "verdict": verdict(run.steps)}


def _credit(group: RunGroup) -> dict[str, Any]:
    """What DADS and STCR did in the runs of a group, with a chart of each that was on and left a trace."""
    seen = credit_seen(prompts for run in group.runs for prompts in prompt_groups(run))
    apo = group.recipe.apo
    return {
        "group": group,
        "seen": seen,
        "dads": apo.dads,
        "stcr": apo.stcr,
        "dads_chart": dads_chart(apo.dads, seen) if apo.dads and seen.weights else None,
        "stcr_chart": stcr_chart(apo.stcr, seen) if apo.stcr and seen.multipliers else None,
    }


def _record(group: RunGroup) -> dict[str, Any]:
    environment = group.runs[0].environment
    return {
        "group": group,
        "recipe": group.recipe.to_yaml(),
        "environment": yaml.safe_dump(environment, sort_keys=False, allow_unicode=True) if environment else "",
    }


def _answer_sources(run: Run, prefix: list[str]) -> Iterator[AnswerSource]:
    """Held-out answers; where the tuned model has none, completions of the last training steps too."""
    root, has_tuned = run.folder.path, False
    for title, path in answer_files(run).items():
        pairs = paired(read_answers(path))
        has_tuned = has_tuned or any(pair.tuned for pair in pairs)
        parts = prefix if prefix and title == OWN_ANSWERS else [*prefix, title]
        yield AnswerSource(", ".join(parts), pairs, root)
    if not has_tuned:
        last = deque(prompt_groups(run), maxlen=TRAINING_GROUPS)
        yield AnswerSource(
            ", ".join([*prefix, "training, last steps"]),
            # Training rows were answered by the tuned model at that step.
            [AnswerPair(None, row) for group in reversed(last) for row in group],
            root,
            reward_names=run.recipe.rewards.functions,
            note="There are no held-out answers of the tuned model (answers.jsonl). These are completions of the last "
            "training steps, newest first.",
        )
