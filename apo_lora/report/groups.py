"""Runs of one recipe that differ only in their seed form a group: one line with a band, one row of a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from apo_lora.recipe.schema import Recipe
from apo_lora.report.runs import Run

NUM_COLOURS = NUM_DASHES = 6
"""As in page/style.css."""
_OF_THE_RUN_ALONE = ("train.seed", "output.dir")


@dataclass(frozen=True)
class Group:
    label: str
    runs: list[Run]
    style: str
    """CSS classes of its colour and its dashes."""

    @property
    def recipe(self) -> Recipe:
        return self.runs[0].recipe

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.seed) for run in self.runs)


def line_style(place: int) -> str:
    """CSS classes; no two of the first 36 are alike, and no two of the first 6 in either part."""
    return f"colour-{place % NUM_COLOURS} dash-{(place + place // NUM_COLOURS) % NUM_DASHES}"


def grouped(runs: Sequence[Run]) -> list[Group]:
    """In the order of their first runs."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(str(_settings(run.recipe)), []).append(run)
    groups = list(members.values())
    labels = _labels([group[0].recipe for group in groups])
    return [
        Group(label, group, line_style(place)) for place, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Key to value of all that makes a group."""
    return {
        f"{section}.{key}": value
        for section, keys in recipe.model_dump().items()
        for key, value in keys.items()
        if f"{section}.{key}" not in _OF_THE_RUN_ALONE
    }


def differences(recipes: Iterable[Recipe]) -> dict[str, list[Any]]:
    """Key to its value in each recipe, of the keys that are not the same in all."""
    settings = [_settings(recipe) for recipe in recipes]
    values = {key: [one[key] for one in settings] for key in settings[0]}
    return {key: column for key, column in values.items() if any(value != column[0] for value in column)}


def _labels(recipes: Sequence[Recipe]) -> list[str]:
    """The method where that tells them apart, else with the first keys that differ."""
    methods = [recipe.method for recipe in recipes]
    if len(set(methods)) == len(methods):
        return methods
    different = differences(recipes)
    named = list(different)[:3]
    labels = [
        ", ".join([method, *(f"{key.split('.')[1]} {different[key][place]}" for key in named)])
        for place, method in enumerate(methods)
    ]
    return [label if labels.count(label) == 1 else f"{label} ({place + 1})" for place, label in enumerate(labels)]
