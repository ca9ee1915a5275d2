"""Run directories as they were recorded, whole or cut short; runs that differ only in their seed form a group."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from pandas import DataFrame

from apo_lora.errors import RecipeError, RunDirError
from apo_lora.recipe import schema
from apo_lora.recipe.schema import Recipe
from apo_lora.run.curves import read_steps
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl
from apo_lora.run.recipes import trained_recipe

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    name: str
    folder: RunDir
    recipe: Recipe
    environment: Row
    steps: DataFrame
    """As curves.read_steps gives them."""
    evaluation: Row
    """eval.json: `before` and `after`, by task."""

    @property
    def seed(self) -> int:
        return self.recipe.train.seed

    @property
    def progress(self) -> str:
        """How far the run has come, as text."""
        done, planned = max(self.steps.index, default=0), self.recipe.train.max_steps
        steps = f"{done} of {planned} steps" if planned else f"{done} steps"
        if "after" in self.evaluation or self.folder.adapter.is_dir():
            return steps
        return f"{steps}; still running, or stopped"


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Raises RunDirError with a line for every path that is not a run, or is given twice."""
    runs, problems, seen = [], [], set()
    for path in map(Path, paths):
        if path.resolve() in seen:
            problems.append(f"{path}: given twice; leave one out")
            continue
        seen.add(path.resolve())
        try:
            runs.append(read_run(path))
        except (RunDirError, RecipeError) as error:
            problems += error.problems
    if problems:
        raise RunDirError(*problems)
    if len({run.name for run in runs}) < len(runs):
        return [replace(run, name=str(run.folder.path)) for run in runs]
    return runs


def read_run(path: Path) -> Run:
    """Raises RunDirError if it is not a run, or cannot be read."""
    folder = RunDir(path)
    if not path.is_dir():
        raise RunDirError(f"{path}: no such folder; give a run directory")
    if not folder.recipe.is_file():
        raise RunDirError(f"{path}: not a run directory (it has no {folder.recipe.name}); give a run directory")
    try:
        recipe = trained_recipe(folder)
    except RecipeError as error:
        raise RunDirError(*(f"{path}: {problem}" for problem in error.problems)) from None
    return Run(
        name=path.resolve().name,
        folder=folder,
        recipe=recipe,
        environment=_read_json(folder.environment),
        steps=read_steps(folder),
        evaluation=_read_json(folder.evaluation),
    )


def _read_json(path: Path) -> Row:
    """Empty where the file is absent."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: cannot be read ({error}); restore it, or leave this run out") from None
    return content if isinstance(content, dict) else {}


COMPLETION_KEYS = frozenset({"correct", "length", "advantage", "kl_weight", "stcr_multiplier"})
ANSWER_KEYS = frozenset({"set", "model", "row", "text", "correct"})


def recorded_groups(run: Run) -> Iterator[list[Row]]:
    """The completions of one prompt in one rollout, group by group, as completions.jsonl holds them."""
    size = run.recipe.grpo.num_generations
    rows = _rows_with(COMPLETION_KEYS, run.folder.completions)
    for _, alike in groupby(rows, key=lambda row: (row.get("step"), row.get("row"), row.get("prompt"))):
        rows = list(alike)  # one step can hold a prompt twice, one group after the other
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def prompt_groups(run: Run) -> Iterator[list[Row]]:
    """The same without a group that a kill cut short."""
    return (group for group in recorded_groups(run) if len(group) == run.recipe.grpo.num_generations)


OWN_ANSWERS = "before and after training"


def answer_files(run: Run) -> dict[str, Path]:
    """Title to file of every record of held-out answers: the run's own, then those of `apo-lora eval`."""
    folder = run.folder
    later = sorted(folder.evaluations.glob(f"*/{folder.answers.name}"))
    found = {OWN_ANSWERS: folder.answers} | {f"evaluation {path.parent.name}": path for path in later}
    return {title: path for title, path in found.items() if path.is_file()}


def read_answers(path: Path) -> list[Row]:
    return list(_rows_with(ANSWER_KEYS, path))


def _rows_with(keys: frozenset[str], path: Path) -> Iterator[Row]:
    """Of a file that may be absent or cut short. Raises RunDirError where a row lacks one of the keys."""
    for number, row in enumerate(read_jsonl(path) if path.is_file() else (), start=1):
        if missing := sorted(keys - row.keys()):
            raise RunDirError(f"{path} line {number}: no {', '.join(missing)}; restore the file, or remove it")
        yield row


# --- groups ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seed alone."""

    label: str
    runs: list[Run]
    place: int
    """Among the groups: decides the colour and the dashes of its line."""

    @property
    def recipe(self) -> Recipe:
        return self.runs[0].recipe

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.seed) for run in self.runs)

    @property
    def style(self) -> str:
        """CSS classes."""
        from apo_lora.run.drawing import css_classes  # matplotlib: a sweep reads runs before it draws any

        return css_classes(self.place)


def grouped(runs: Sequence[Run]) -> list[RunGroup]:
    """In the order of their first runs."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        recipe_of_group = run.recipe.model_dump_json(exclude={"train": {"seed"}, "output": {"dir"}})
        members.setdefault(recipe_of_group, []).append(run)
    labels = _labels([group[0].recipe for group in members.values()])
    return [RunGroup(*group, place) for place, group in enumerate(zip(labels, members.values(), strict=True))]


def differences(recipes: Sequence[Recipe]) -> dict[str, list[Any]]:
    """Key to its value in each recipe, of the keys that are not the same in all; a group's own keys are left out."""
    keys = dict.fromkeys(key for other in recipes[1:] for key in schema.differences(recipes[0], other))
    return {
        key: [attrgetter(key)(recipe) for recipe in recipes] for key in keys if key not in ("train.seed", "output.dir")
    }


def _labels(recipes: Sequence[Recipe]) -> list[str]:
    """The method where that tells them apart, else with the first keys that differ."""
    methods = [recipe.method for recipe in recipes]
    if len(set(methods)) == len(methods):
        return methods
    different = list(differences(recipes).items())[:3]
    labels = [
        ", ".join([method, *(f"{key.split('.')[1]} {values[place]}" for key, values in different)])
        for place, method in enumerate(methods)
    ]
    return [label if labels.count(label) == 1 else f"{label} ({place + 1})" for place, label in enumerate(labels)]
