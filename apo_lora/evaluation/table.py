"""The figures of an evaluation as lines for a terminal. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apo_lora.data.benchmarks import BENCHMARKS
from apo_lora.evaluation.figures import MODELS
from apo_lora.run.tables import aligned

Figures = dict[str, Any]
"""eval.json: base and tuned (title -> figures.summary), difference (title -> figures.compared), sets."""


def table(figures: Figures) -> list[str]:
    """Accuracy and difference per set; then how the answers look, pass@k, categories, and the paper's figures."""
    tables = [_sets(figures), _completions(figures), _passes(figures), _categories(figures), paper_lines(figures)]
    return [line for lines in tables if lines for line in [*lines, ""]]


def _models(figures: Figures) -> list[str]:
    return [model for model in MODELS if model in figures]


def _columns(figures: Figures) -> list[str]:
    """The models, and their difference where there are two."""
    return [column for column in (*MODELS, "difference") if column in figures]


def _sets(figures: Figures) -> list[str]:
    rows = ((title, {column: figures[column][title] for column in _columns(figures)}) for title in figures["sets"])
    return _accuracies("accuracy, greedy (95 %)", figures, rows)


def _categories(figures: Figures) -> list[str]:
    rows = (
        (f"{title}: {name}", {column: figures[column][title]["categories"][name] for column in _columns(figures)})
        for title in figures["sets"]
        for names in [figures[_models(figures)[0]][title]["categories"]]
        for name in (names if len(names) > 1 else ())
    )
    return _accuracies("by category, greedy (95 %)", figures, rows)


def _accuracies(heading: str, figures: Figures, rows: Iterable[tuple[str, Mapping[str, Figures]]]) -> list[str]:
    """`rows` are (label, column -> its figures)."""
    models = _models(figures)
    lines = [[heading, "items", *models]]
    if "difference" in figures:
        lines[0] += ["difference", "better / worse", "sign test p"]
    for label, by_column in rows:
        lines.append([label, str(by_column[models[0]]["items"]), *(_share(by_column[model]) for model in models)])
        if change := by_column.get("difference"):
            low, high = change["accuracy_95_low"], change["accuracy_95_high"]
            lines[-1].append(f"{change['accuracy']:+.3f} ({low:+.2f} to {high:+.2f})")
            lines[-1].append(f"{change['only_tuned']} / {change['only_base']}")
            lines[-1].append(f"{change['sign_test_p']:.2g}")
    return aligned(lines)


def _completions(figures: Figures) -> list[str]:
    columns = {
        "tokens when right": ("length_correct", ".0f"),
        "when wrong": ("length_wrong", ".0f"),
        "truncated": ("truncated", ".3f"),
        "well formatted": ("well_formatted", ".3f"),
        "nats per token": ("entropy", ".3f"),
    }
    rows = [
        [title, model, *(_number(figures[model][title][name], form) for name, form in columns.values())]
        for title in figures["sets"]
        for model in _models(figures)
    ]
    return aligned([["greedy completions", "", *columns], *rows])


def _passes(figures: Figures) -> list[str]:
    rows = []
    for title in figures["sets"]:
        for k in figures[_models(figures)[0]][title].get("pass_at_k", {}):
            by_column = {column: figures[column][title]["pass_at_k"][k] for column in _columns(figures)}
            change = by_column.pop("difference", None)
            values = (f"{v['value']:.3f} ({v['95_low']:.2f}-{v['95_high']:.2f})" for v in by_column.values())
            rows.append([title, k, *values])
            if change:
                rows[-1].append(f"{change['value']:+.3f} ({change['95_low']:+.2f} to {change['95_high']:+.2f})")
    return aligned([["pass@k, sampled (95 %)", "k", *_columns(figures)], *rows])


def paper_lines(figures: Figures) -> list[str]:
    """The paper's table with what was measured here below it; nothing where no benchmark was measured."""
    measured = [title for title in figures["sets"] if title in BENCHMARKS]
    if not measured:
        return []
    rows = [["accuracy in %", *(benchmark.title for benchmark in BENCHMARKS.values())]]
    for place, who in enumerate(("Qwen2.5-VL-3B", "View-R1-3B")):
        rows.append([f"paper: {who}", *(f"{benchmark.paper[place]:.1f}" for benchmark in BENCHMARKS.values())])
    for column in _columns(figures):
        sign = "+" if column == "difference" else ""
        rows.append([f"here: {column}", *(_percent(figures[column].get(name), sign) for name in BENCHMARKS)])
    return [
        *aligned(rows),
        "Prompt and judge are not the paper's: compare differences, not rows (see docs/evaluation.md).",
        *_what_was_left_out(figures, measured),
    ]


def _what_was_left_out(figures: Figures, measured: Sequence[str]) -> list[str]:
    """What makes the rows here smaller than the benchmarks."""
    lines = []
    for title in measured:
        about = figures["sets"][title]
        if about["limit"] is not None:
            lines.append(f"{title}: only the first {about['limit']} rows (--limit)")
        if dropped := sum(about["dropped"].values()):
            reasons = ", ".join(f"{count} {reason}" for reason, count in about["dropped"].items())
            lines.append(f"{title}: {dropped} of {about['rows']} rows dropped ({reasons})")
    return lines


def _share(of_set: Figures) -> str:
    return f"{of_set['accuracy']:.3f} ({of_set['accuracy_95_low']:.2f}-{of_set['accuracy_95_high']:.2f})"


def _percent(of_set: Figures | None, sign: str) -> str:
    if of_set is None:
        return "-"
    value, low, high = (100 * of_set[key] for key in ("accuracy", "accuracy_95_low", "accuracy_95_high"))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
