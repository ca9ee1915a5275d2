"""What was measured on held-out items, and where training ended: one row per group of runs, or per run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from apo_lora.report.curves import last_value
from apo_lora.report.runs import Run, is_number


@dataclass(frozen=True)
class Measured:
    """One quantity in words; a dash where it was not measured."""

    value: str
    """The mean over runs."""
    spread: str = ""
    """Lowest and highest run; of a single run's accuracy the 95 % interval; else empty."""


@dataclass(frozen=True)
class ResultRow:
    label: str
    style: str
    """CSS classes of its line; empty for none."""
    seeds: str
    progress: str
    figures: list[tuple[Measured, ...]]
    """In the order of COLUMNS; (before, after) or (at the end,)."""


COLUMNS = (
    "Accuracy, held out",
    "Tokens when wrong",
    "Accuracy, general",
    "Entropy at the end",
    "KL at the end",
)


def result_row(label: str, style: str, runs: Sequence[Run]) -> ResultRow:
    return ResultRow(
        label=label,
        style=style,
        seeds=", ".join(str(run.seed) for run in runs),
        progress="; ".join(dict.fromkeys(run.progress for run in runs)),
        figures=[
            _before_and_after(runs, "reasoning", "accuracy", ".3f"),
            _before_and_after(runs, "reasoning", "length_wrong", ".0f"),
            _before_and_after(runs, "general", "accuracy", ".3f"),
            (_mean(last_value(runs, "entropy"), ".3f"),),
            (_mean(last_value(runs, "kl"), ".4f"),),
        ],
    )


def _before_and_after(runs: Sequence[Run], task: str, name: str, form: str) -> tuple[Measured, Measured]:
    return tuple(_held_out(runs, when, task, name, form) for when in ("before", "after"))


def _held_out(runs: Sequence[Run], when: str, task: str, name: str, form: str) -> Measured:
    measured = [run.evaluation.get(when, {}).get(task, {}) for run in runs]
    measured = [figures for figures in measured if is_number(figures.get(name))]
    shown = _mean([figures[name] for figures in measured], form)
    if len(measured) == 1 and name == "accuracy":
        return replace(shown, spread=_range(measured[0]["accuracy_95_low"], measured[0]["accuracy_95_high"], ".2f"))
    return shown


def _mean(values: Sequence[float], form: str) -> Measured:
    if not values:
        return Measured("-")
    spread = _range(min(values), max(values), form) if len(values) > 1 else ""
    return Measured(format(sum(values) / len(values), form), spread)


def _range(low: float, high: float, form: str) -> str:
    return f"{low:{form}} to {high:{form}}"
