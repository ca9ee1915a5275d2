"""The figures of an evaluation as lines for a terminal. No torch."""

from collections.abc import Sequence
from typing import Any

from apo_lora.data.benchmarks import BENCHMARKS

Figures = dict[str, Any]
"""eval.json: base and tuned (title -> figures.summary), difference (title -> figures.compared), sets."""


def table(figures: Figures) -> list[str]:
    """Accuracy and difference per set; then how the answers look, pass@k, categories, and the paper's figures."""
    parts = [_accuracy(figures), _manner(figures), _passes(figures), _categories(figures), paper_lines(figures)]
    return [line for part in parts if part for line in [*part, ""]]


def _models(figures: Figures) -> list[str]:
    return [model for model in ("base", "tuned") if model in figures]


def _accuracy(figures: Figures) -> list[str]:
    models = _models(figures)
    rows = []
    for title, about in figures["sets"].items():
        row = [title, str(about["items"]), *(_share(figures[model][title]) for model in models)]
        rows.append(row + _difference(figures.get("difference", {}).get(title)))
    head = ["accuracy, greedy (95 %)", "items", *models]
    return _aligned([*head, "difference", "better / worse", "sign test p"] if len(models) > 1 else head, rows)


def _difference(compared: Figures | None) -> list[str]:
    if compared is None:
        return []
    changes = f"{compared['only_tuned']} / {compared['only_base']}"
    return [_signed(compared), changes, f"{compared['sign_test_p']:.2g}"]


def _manner(figures: Figures) -> list[str]:
    rows = [
        [
            title,
            model,
            _number(of_set["length_correct"], ".0f"),
            _number(of_set["length_wrong"], ".0f"),
            f"{of_set['truncated']:.3f}",
            f"{of_set['well_formatted']:.3f}",
            _number(of_set["entropy"], ".3f"),
        ]
        for title in figures["sets"]
        for model in _models(figures)
        for of_set in [figures[model][title]]
    ]
    head = [
        "greedy completions",
        "",
        "tokens when right",
        "when wrong",
        "truncated",
        "well formatted",
        "nats per token",
    ]
    return _aligned(head, rows)


def _passes(figures: Figures) -> list[str]:
    models = _models(figures)
    rows = []
    for title in figures["sets"]:
        for k in figures[models[0]][title].get("pass_at_k", {}):
            values = [figures[model][title]["pass_at_k"][k] for model in models]
            row = [title, k, *(f"{v['value']:.3f} ({v['95_low']:.2f}-{v['95_high']:.2f})" for v in values)]
            if len(models) > 1:
                change = figures["difference"][title]["pass_at_k"][k]
                row.append(f"{change['value']:+.3f} ({change['95_low']:+.2f} to {change['95_high']:+.2f})")
            rows.append(row)
    return _aligned(["pass@k, sampled (95 %)", "k", *models, "difference"][: 2 + len(models) + (len(models) > 1)], rows)


def _categories(figures: Figures) -> list[str]:
    models = _models(figures)
    rows = []
    for title in figures["sets"]:
        categories = figures[models[0]][title]["categories"]
        for category, of_category in categories.items() if len(categories) > 1 else ():
            shares = [_share(figures[model][title]["categories"][category]) for model in models]
            compared = figures.get("difference", {}).get(title, {}).get("categories", {}).get(category)
            rows.append([f"{title}: {category}", str(of_category["items"]), *shares, *_difference(compared)])
    head = ["by category, greedy (95 %)", "items", *models]
    return _aligned([*head, "difference", "better / worse", "sign test p"] if len(models) > 1 else head, rows)


def paper_lines(figures: Figures) -> list[str]:
    """The paper's table with what was measured here below it; nothing where no benchmark was measured."""
    measured = [title for title in figures["sets"] if title in BENCHMARKS]
    if not measured:
        return []
    names = list(BENCHMARKS)
    rows = [
        [f"paper: {who}", *(f"{BENCHMARKS[name].paper[place]:.1f}" for name in names)]
        for place, who in enumerate(("Qwen2.5-VL-3B", "View-R1-3B"))
    ]
    for model in _models(figures):
        rows.append([f"here: {model}", *(_percent(figures[model].get(name)) for name in names)])
    if "difference" in figures:
        rows.append(["here: difference", *(_percent(figures["difference"].get(name), sign="+") for name in names)])
    head = ["accuracy in %", *(BENCHMARKS[name].title for name in names)]
    return [
        *_aligned(head, rows),
        "Another prompt and judge than the paper's: compare differences, not rows (docs/evaluation.md says how).",
        *_cut_words(figures, measured),
    ]


def _cut_words(figures: Figures, measured: Sequence[str]) -> list[str]:
    """What makes the rows here smaller than the benchmarks."""
    cut = []
    for title in measured:
        about = figures["sets"][title]
        if about["limit"] is not None:
            cut.append(f"{title}: the first {about['limit']} rows alone (--limit)")
        if dropped := sum(about["dropped"].values()):
            reasons = ", ".join(f"{count} {reason}" for reason, count in about["dropped"].items())
            cut.append(f"{title}: {dropped} of {about['rows']} rows left out ({reasons})")
    return cut


# --- pieces ----------------------------------------------------------------------------------------------------------


def _share(of_set: Figures) -> str:
    return f"{of_set['accuracy']:.3f} ({of_set['accuracy_95_low']:.2f}-{of_set['accuracy_95_high']:.2f})"


def _signed(compared: Figures) -> str:
    low, high = compared["accuracy_95_low"], compared["accuracy_95_high"]
    return f"{compared['accuracy']:+.3f} ({low:+.2f} to {high:+.2f})"


def _percent(of_set: Figures | None, sign: str = "") -> str:
    if of_set is None:
        return "-"
    value, low, high = (100 * of_set[key] for key in ("accuracy", "accuracy_95_low", "accuracy_95_high"))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be, words to the left, the rest to the right; nothing without rows."""
    if not rows:
        return []
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
