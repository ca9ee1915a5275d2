"""The figures that are compared: one table row each, read from a finished run's record."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl

Record = tuple[dict[str, Any], list[dict[str, Any]]]
"""eval.json, and the rows of metrics.jsonl."""


@dataclass(frozen=True)
class Figure:
    key: str
    title: str
    unit: str
    read: Callable[[Record, int], float | None]
    """Of a run's record; the second argument is how many last steps count as the end."""
    form: str
    """How a value is written."""
    per_step: str | None = None
    """The metric whose course over the steps belongs to it; none where only before and after are measured."""
    held_out: tuple[str, str] | None = None
    """Task and key in eval.json, where the figure comes from there."""


def _held_out(task: str, key: str) -> dict[str, Any]:
    def read(record: Record, final_steps: int) -> float | None:
        return record[0]["after"].get(task, {}).get(key)

    return {"read": read, "held_out": (task, key)}


def _at_the_end(metric: str) -> dict[str, Any]:
    def read(record: Record, final_steps: int) -> float | None:
        values = [row[metric] for row in record[1][-final_steps:] if row.get(metric) is not None]
        return sum(values) / len(values) if values else None

    return {"read": read, "per_step": metric}


FIGURES = (
    Figure(
        "accuracy",
        "Reasoning accuracy",
        "fraction right",
        form=".3f",
        **_held_out("reasoning", "accuracy") | {"per_step": "accuracy"},
    ),
    Figure(
        "length_wrong",
        "Length of wrong answers",
        "tokens",
        form=".1f",
        **_held_out("reasoning", "length_wrong") | {"per_step": "length_wrong"},
    ),
    Figure("entropy", "Entropy", "nats per token", form=".4f", **_at_the_end("entropy")),
    Figure(
        "general_accuracy",
        "General accuracy",
        "fraction right",
        form=".3f",
        **_held_out("general", "accuracy"),
    ),
    Figure("kl", "KL to the base", "nats per token", form=".4f", **_at_the_end("kl")),
)


def read_record(run_dir: RunDir) -> Record:
    return json.loads(run_dir.evaluation.read_text()), list(read_jsonl(run_dir.metrics))


def figures_of(record: Record, final_steps: int) -> dict[str, float | None]:
    """Figure's key to its value in one run; None where there was nothing to average."""
    return {figure.key: figure.read(record, final_steps) for figure in FIGURES}


def figures_before(record: Record) -> dict[str, float | None]:
    """The same of the base, where it was measured: before step 1 on held-out items, at step 1 for the rest."""
    evaluation, rows = record
    return {
        figure.key: (
            evaluation.get("before", {}).get(figure.held_out[0], {}).get(figure.held_out[1])
            if figure.held_out
            else rows[0].get(figure.per_step)
        )
        for figure in FIGURES
    }
