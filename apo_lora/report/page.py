"""A report as HTML: everything the template needs, gathered and filled in. Nothing in it asks the network."""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from tqdm.auto import tqdm

from apo_lora import __version__
from apo_lora.errors import RunDirError
from apo_lora.evaluation.gallery import MOST_BYTES, content_policy, gallery, page_file
from apo_lora.report.answers import answer_sources
from apo_lora.report.chart import Chart, rounded_range, scatter_chart, step_chart
from apo_lora.report.cost import cost
from apo_lora.report.credit import CreditSeen, credit_seen, dads_curve, stcr_curve
from apo_lora.report.curves import curve
from apo_lora.report.groups import Group, differences, grouped, line_style
from apo_lora.report.results import COLUMNS, result_row
from apo_lora.report.runs import Run, prompt_groups
from apo_lora.run.learning_signal import ALARM_SHARE, verdict
from apo_lora.run.summary import evaluation_table

GENERATOR = "apo-lora report"

SHARE = (0.0, 1.0)
CURVES = (
    ("Accuracy", "share of sampled completions", {"accuracy": ""}, SHARE),
    ("Reward", "mean of completions", {"reward": ""}, None),
    ("Length", "tokens", {"length_correct": "right", "length_wrong": "wrong"}, None),
    ("Entropy", "nats per token", {"entropy": "all", "entropy_correct": "right", "entropy_wrong": "wrong"}, None),
    (
        "KL to the base",
        "nats per token",
        {"kl": "all", "kl_positives": "positive advantage", "kl_negatives": "others"},
        None,
    ),
    ("Gradient norm", "before clipping", {"grad_norm": ""}, None),
)
"""Title, unit, metrics of metrics.jsonl with their labels, and the range of the axis where it is fixed."""

SIGNAL_CURVES = (
    ("Reward variance", "share of groups that have it", {"groups_with_variance": ""}, SHARE),
    ("One-sided groups", "share of groups", {"all_right_groups": "all right", "all_wrong_groups": "all wrong"}, SHARE),
    ("Truncated", "share of completions", {"truncated": ""}, SHARE),
)
ALARM_LINE = {"groups_with_variance": 1 - ALARM_SHARE, "truncated": ALARM_SHARE}
"""Where the screen's alarms begin."""


def render(runs: Sequence[Run]) -> str:
    """The whole page, under MOST_BYTES. Raises RunDirError where even a page without gallery is too large."""
    groups = grouped(runs)
    content = {
        "version": __version__,
        "generator": GENERATOR,
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        "runs": runs,
        "groups": groups,
        "evaluation": evaluation_table(runs[0].evaluation) if len(runs) == 1 else [],
        "columns": COLUMNS,
        "group_rows": [result_row(group.label, group.style, group.runs) for group in groups],
        "run_rows": [result_row(run.name, "", [run]) for group in groups for run in group.runs],
        "differences": differences([group.recipe for group in groups]),
        "curves": list(_panels(CURVES, groups)),
        "signal_curves": list(_panels(SIGNAL_CURVES, groups)),
        "signal": [_signal(run) for group in groups for run in group.runs],
        "costs": [(group, cost(group.runs)) for group in groups],
        "credit": [_credit(group) for group in tqdm(groups, "completions", delay=2, leave=False)],
        "record": [_record(group) for group in groups],
    }
    size = len(_filled(content, Markup()).encode("utf-8", "replace"))
    room = MOST_BYTES - size - 100_000  # for what stands around the items
    if room < 0:
        raise RunDirError(f"a page of {len(runs)} runs takes {size / 1e6:.1f} MB without a completion; give fewer runs")
    return _filled(content, gallery(answer_sources(runs), room))


def _filled(content: dict[str, Any], completions: Markup) -> str:
    environment = Environment(
        loader=PackageLoader("apo_lora.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own_style = files("apo_lora.report").joinpath("page", "style.css").read_text(encoding="utf-8")
    style = page_file("page.css") + page_file("gallery.css") + Markup(own_style)
    script = page_file("gallery.js")
    return environment.get_template("report.html").render(
        **content, completions=completions, style=style, script=script, policy=content_policy(style, script)
    )


# --- charts ----------------------------------------------------------------------------------------------------------


def _panels(specifications: Sequence[tuple], groups: Sequence[Group]) -> Iterator[Chart]:
    """One panel per quantity. With one group its metrics share the panel; with several each metric has its own, on a
    common axis, and the lines are the groups."""
    for title, unit, metrics, fixed_range in specifications:
        curves = {metric: [curve(group.runs, metric) for group in groups] for metric in metrics}
        values = [value for of_metric in curves.values() for one in of_metric for value in one.values]
        if not values:
            continue
        options = {"value_range": fixed_range or rounded_range(values)}
        if len(groups) == 1:
            lines = [(metrics[name], line_style(place), curves[name][0]) for place, name in enumerate(metrics)]
            threshold = ALARM_LINE.get(next(iter(metrics)))
            panels = [step_chart(title, unit, lines, threshold=threshold, show_legend=len(lines) > 1, **options)]
        else:
            panels = [
                step_chart(
                    f"{title}, {label}" if label else title,
                    unit,
                    [(group.label, group.style, one) for group, one in zip(groups, curves[name], strict=True)],
                    threshold=ALARM_LINE.get(name),
                    show_legend=False,
                    **options,
                )
                for name, label in metrics.items()
            ]
        yield from filter(None, panels)


def _signal(run: Run) -> dict[str, Any]:
    """The share of groups with reward variance over all steps, and what that means."""
    shares = run.values("groups_with_variance").values()
    share = sum(shares) / len(shares) if shares else None
    return {"run": run.name, "share": share, "verdict": verdict(run.steps)}


def _credit(group: Group) -> dict[str, Any]:
    """What DADS and STCR did in the runs of a group, with a chart of each that was on and left a trace."""
    seen = credit_seen(prompts for run in group.runs for prompts in prompt_groups(run))
    apo = group.recipe.apo
    return {
        "group": group,
        "seen": seen,
        "dads": apo.dads,
        "stcr": apo.stcr,
        "dads_chart": _dads_chart(apo.dads, seen) if apo.dads and seen.weights else None,
        "stcr_chart": _stcr_chart(apo.stcr, seen) if apo.stcr and seen.multipliers else None,
    }


def _dads_chart(shape: str, seen: CreditSeen) -> Chart:
    return scatter_chart(
        "KL weight by group accuracy",
        "DADS, completions with a positive advantage",
        "accuracy of the group",
        f"{seen.weights.total()} completions; their mean weight is {seen.mean_weight:.3f}.",
        seen.weights,
        dads_curve(shape),
        SHARE,
    )


def _stcr_chart(base: float, seen: CreditSeen) -> Chart:
    excesses = [excess for excess, _ in seen.multipliers]
    shortest, longest = min(0.0, *excesses), max(1.0, *excesses)
    formula = stcr_curve(base, shortest, longest)
    return scatter_chart(
        "Multiplier by excess length",
        "STCR, wrong completions beside right ones",
        "tokens above the mean of right answers",
        f"{seen.multipliers.total()} wrong completions, {seen.amplified} with a multiplier above 1.",
        seen.multipliers,
        formula,
        rounded_range([1.0, *(value for _, value in formula), *(value for _, value in seen.multipliers)]),
    )


def _record(group: Group) -> dict[str, Any]:
    environment = group.runs[0].environment
    return {
        "group": group,
        "recipe": group.recipe.to_yaml(),
        "environment": yaml.safe_dump(environment, sort_keys=False, allow_unicode=True) if environment else "",
    }
