"""The paper's benchmarks as data sets: where they are on the Hub, and how a row of each becomes a row of ours.

`apo-lora eval --data mathvista` loads one from the Hub, `mathvista:PATH` from a file or folder of the same schema. The
schemas are those of the data sets' cards and of their readers in lmms-eval (docs/evaluation.md says what was checked).
No torch.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apo_lora.data.choices import lettered
from apo_lora.data.text import BadRow, as_text
from apo_lora.errors import DataError

Row = Mapping[str, Any]

_MMMU_SUBJECTS = (
    "Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory", "Basic_Medical_Science",
    "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design", "Diagnostics_and_Laboratory_Medicine",
    "Economics", "Electronics", "Energy_and_Power", "Finance", "Geography", "History", "Literature", "Manage",
    "Marketing", "Materials", "Math", "Mechanical_Engineering", "Music", "Pharmacy", "Physics", "Psychology",
    "Public_Health", "Sociology",
)  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    title: str
    hub_id: str
    split: str
    configs: tuple[str | None, ...]
    """Parts of the data set on the Hub, all of them measured; None is its only one."""
    columns: tuple[str, ...]
    """What a row must have."""
    convert: Callable[[Row], dict[str, Any]]
    """A row -> the columns problem, answer, choices, images, category. Raises BadRow."""
    paper: tuple[float, float]
    """Accuracy in per cent of Qwen2.5-VL-3B and of View-R1-3B (arXiv 2506.21655)."""


# --- conversions -----------------------------------------------------------------------------------------------------


def _mathvista(row: Row) -> dict[str, Any]:
    """Gold is a choice's text or a number; the question says in which form, as the official prompts do."""
    problem = as_text(row["question"])
    if row.get("unit"):
        problem += f" (Unit: {row['unit']})"
    precision = row.get("precision")
    if row.get("answer_type") == "float" and precision:
        problem += f"\nGive the answer as a number with {as_text(precision)} decimal place{'s' * (precision != 1)}."
    elif row.get("answer_type") == "list":
        problem += "\nGive the answer as a list, for instance [1, 2, 3]."
    category = (row.get("metadata") or {}).get("task")
    return _converted(problem, row["answer"], row.get("choices"), row["decoded_image"], category)


def _mathverse(row: Row) -> dict[str, Any]:
    """Where the question is only in the image (Vision Only), the official prompt says so."""
    problem = as_text(row["question"]).strip() or as_text(row.get("query_wo"))
    return _converted(problem, row["answer"], _listed(lettered(problem)), row["image"], row.get("problem_version"))


def _mmk12(row: Row) -> dict[str, Any]:
    problem = as_text(row["question"])
    return _converted(problem, row["answer"], _listed(lettered(problem)), row["image"], row.get("subject"))


def _mmstar(row: Row) -> dict[str, Any]:
    """Options follow the question on one line: "Options: A: one, B: two"."""
    problem = as_text(row["question"])
    _, _, options = problem.rpartition("Options:")
    return _converted(
        problem, row["answer"], _listed(lettered(options, r"(?:^|,)\s*")), row["image"], row.get("category")
    )


def _mmmu(row: Row) -> dict[str, Any]:
    """`<image 2>` in question and options names the column image_2; options are a list, written as text."""
    images = [row.get(f"image_{number}") for number in range(1, 8)]
    subject = re.sub(r"^[a-z]+_|_\d+$", "", as_text(row["id"]))
    return _converted(as_text(row["question"]), row["answer"], row["options"], images, subject)


def _listed(options: dict[str, str] | None) -> list[str] | None:
    return list(options.values()) if options else None


def _converted(problem: str, answer: Any, choices: Any, images: Any, category: Any) -> dict[str, Any]:
    return {"problem": problem, "answer": answer, "choices": choices, "images": images, "category": category}


# --- the table -------------------------------------------------------------------------------------------------------

BENCHMARKS: dict[str, Benchmark] = {
    "mathvista": Benchmark(
        "MathVista", "AI4Math/MathVista", "testmini", (None,), ("question", "answer", "decoded_image"), _mathvista,
        paper=(57.8, 66.2),
    ),
    "mathverse": Benchmark(
        "MathVerse", "AI4Math/MathVerse", "testmini", ("testmini",), ("question", "answer", "image"), _mathverse,
        paper=(34.7, 41.6),
    ),
    "mmk12": Benchmark(
        "MMK12", "FanqingM/MMK12", "test", (None,), ("question", "answer", "image"), _mmk12,
        paper=(43.5, 47.0),
    ),
    "mmstar": Benchmark(
        "MMStar", "Lin-Chen/MMStar", "val", (None,), ("question", "answer", "image"), _mmstar,
        paper=(54.1, 61.3),
    ),
    "mmmu": Benchmark(
        "MMMU", "MMMU/MMMU", "validation", _MMMU_SUBJECTS, ("id", "question", "options", "answer", "image_1"), _mmmu,
        paper=(47.6, 48.9),
    ),
}  # fmt: skip


def find_benchmark(spec: str) -> tuple[Benchmark, str | None] | None:
    """The benchmark of "mathvista" or "mathvista:PATH", with the path; None where it names none."""
    name, colon, path = spec.partition(":")
    return (BENCHMARKS[name], path if colon else None) if name in BENCHMARKS else None


def converted_rows(benchmark: Benchmark, rows: list[tuple[int, Any]], source: str) -> list[tuple[int, Any]]:
    """Rows in our columns; a BadRow in place of one that cannot be converted. Raises DataError for another schema."""
    first = next((row for _, row in rows if isinstance(row, Mapping)), {})
    if missing := [name for name in benchmark.columns if name not in first]:
        raise DataError(
            f"{source}: does not have the schema of {benchmark.title}: no column {', '.join(missing)} (found: "
            f"{', '.join(first) or 'none'}); give the benchmark's original files"
        )
    return [(number, _converted_row(benchmark, row)) for number, row in rows]


def _converted_row(benchmark: Benchmark, row: Any) -> Any:
    try:
        return benchmark.convert(row)
    except BadRow as bad:
        return bad
